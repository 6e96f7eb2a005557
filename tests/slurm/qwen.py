"""A part of `make test-sky`: the profile for rented GPUs as one rents them: every stage that can use a GPU.

The rehearsal of tests/rehearsal.py, with two machines that SkyPilot finds on the loopback Slurm: sft, agreement and
benchmark share one with two of the declared H200s, distill and rl one with four, where two serve and two train. Then rl
runs on two, which serve and train by turns.
"""

import json
from pathlib import Path

import pytest
from on_slurm import OFFLINE, at_work, begin, committed, ended, jobs, log, sky
from rehearsal import QWEN, address, stand_in  # noqa: F401 (a fixture)
from ruamel.yaml import YAML
from small import checkout

from apprentice.gpus import REHEARSAL
from apprentice.pipeline import ROOT


def compute(top: Path, hub: str, rl: str, vllm_gpus: list[int] | None) -> None:
    """Every stage that can use a GPU goes to Slurm. rl: the machine for it and distill."""
    known = {**OFFLINE, REHEARSAL: "1", "HF_ENDPOINT": hub}
    place = {"where": "sky", "any_of": [{"infra": "slurm"}], "lock": "requirements.lock", "environment": known}
    on = {name: {**place, "machine": name, "accelerators": f"H200:{gpus}"} for name, gpus in (("two", 2), ("four", 4))}
    stages = dict.fromkeys(("sft", "agreement", "benchmark_student"), on["two"])
    stages |= dict.fromkeys(("distill", "rl"), on[rl])
    with (top / "compute.yaml").open("w") as file:
        YAML().dump({"stages": stages, "vllm": {"program": "stand-in", "gpus": vllm_gpus}}, file)


@pytest.fixture(scope="module")
def ran(address, tmp_path_factory) -> Path:  # noqa: F811
    """A checkout where the whole pipeline has run, its GPU stages on Slurm."""
    top = checkout(tmp_path_factory.mktemp("qwen") / "qwen", QWEN)
    (top / ".venv-sky").symlink_to(ROOT / ".venv-sky")
    stand_in(top / "stand-in", ".venv/bin/python")
    compute(top, address, "four", vllm_gpus=[0, 1])
    committed(top)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)  # for the stage that runs here: student
        assert ended(top, begin(top, "dvc", "repro"), 2400) == 0, log(top)[-5000:]
    return top


def test_the_whole_profile_runs_on_machines_that_are_found(ran):
    scores = json.loads((ran / "metrics/benchmark.json").read_text())
    assert list(scores) == ["random", "base", "rl"]
    assert json.loads((ran / "metrics/rl.json").read_text())["iterations"] == 2
    assert (ran / "metrics/report.html").stat().st_size > 100_000
    assert log(ran).count("ended with exit code 0") == 6
    assert len(jobs()) == 2


def test_rl_runs_by_turns_too(ran, address):  # noqa: F811
    (ran / "metrics/rl.json").unlink()
    compute(ran, address, "two", vllm_gpus=None)
    assert ended(ran, begin(ran, "apprentice", "launch", "rl")) == 0, log(ran)[-5000:]
    assert json.loads((ran / "metrics/rl.json").read_text())["iterations"] == 2
    assert log(ran).count("ended with exit code 0") == 7


def test_no_machine_is_left(ran):
    for stage in ("sft", "distill"):  # one of each machine
        assert ended(ran, begin(ran, "apprentice", "launch", stage, "--stop")) == 0, log(ran)[-3000:]
    assert json.loads(sky("status", "-o", "json")) == []
    assert not jobs() and not at_work() - {"ps"}
