"""The profile for rented GPUs from end to end without one: a Qwen3-VL of two layers, pretended GPUs, no real vLLM.

Run by `make test-rehearsal`: minutes of CPU, so not a part of `make test`. tests/slurm/qwen.py has it once more with
machines that SkyPilot finds, where two GPUs serve and two train. What differs from a run on GPUs: numbers of layers,
widths and steps; gloo for NCCL.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub import hub, write
from ruamel.yaml import YAML
from small import checkout, environment

from apprentice import params
from apprentice.gpus import REHEARSAL
from apprentice.pipeline import ROOT

PROFILE = params.load(ROOT / "params.yaml").profiles["qwen2b"]
QWEN = {
    "profile": "qwen2b",
    "teachers.expert.seeds": "0-5",
    "teachers.expert.max_steps": 12,
    "benchmark.seeds": "200000-200003",
    "benchmark.max_steps": 4,
    "benchmark.bootstrap_samples": 100,
    "benchmark.agents": {"random": {"policy": "random"}},
    "benchmark.students": {"base": "models/base", "rl": "models/rl"},  # without an adapter, and with one
    "profiles.qwen2b.sampling.max_tokens": 32,
    "profiles.qwen2b.sft.batch_size": 8,
    "profiles.qwen2b.sft.micro_batch_size": 2,
    "profiles.qwen2b.sft.epochs": 1,
    "profiles.qwen2b.sft.evaluation": {"seeds": "320000-320001", "max_steps": 4},
    "profiles.qwen2b.distill.rounds": 2,
    "profiles.qwen2b.distill.worlds": 2,
    "profiles.qwen2b.distill.max_steps": 4,
    "profiles.qwen2b.distill.steps": 2,
    "profiles.qwen2b.distill.batch_size": 8,
    "profiles.qwen2b.distill.micro_batch_size": 2,
    "profiles.qwen2b.rl.evaluation": {"seeds": "310000-310001", "every": 2},
    "profiles.qwen2b.rl.iterations": 2,
    "profiles.qwen2b.rl.groups": 2,
    "profiles.qwen2b.rl.group_size": 2,
    "profiles.qwen2b.rl.max_steps": 4,
    "profiles.qwen2b.rl.decisions": 16,
    "profiles.qwen2b.rl.batch_size": 8,
    "profiles.qwen2b.rl.micro_batch_size": 2,
    "profiles.qwen2b.rl.max_invalid_rate": 1.0,  # nothing that random weights say is a reply
}
"""Fewer and shorter, and nothing else: layers and widths are the hub's."""


def rehearsed(cache: Path, address: str, gpus: str) -> dict[str, str]:
    """The variables of a run on so many pretended GPUs."""
    return environment(cache) | {REHEARSAL: "1", "CUDA_VISIBLE_DEVICES": gpus, "HF_ENDPOINT": address}


def stand_in(path: Path, python: str) -> None:
    """A program like `vllm`, to be run in a checkout by this Python."""
    path.write_text(f'#!/bin/sh\nPYTHONPATH="src:$PYTHONPATH" exec "{python}" tests/serving/stand_in.py "$@"\n')
    path.chmod(0o755)


def run(top: Path, variables: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=top,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    write(folder, PROFILE.prompt)
    with hub(folder, PROFILE.student.model, PROFILE.student.revision) as found:
        yield found


@pytest.fixture(scope="module")
def ran(address, tmp_path_factory) -> Path:
    """A checkout where the whole pipeline has run on two GPUs, which play and train by turns."""
    folder = tmp_path_factory.mktemp("rehearsal")
    stand_in(folder / "vllm", sys.executable)
    top = checkout(folder / "checkout", QWEN)
    with (top / "compute.yaml").open("w") as file:
        YAML().dump({"vllm": {"program": str(folder / "vllm")}}, file)
    said = run(top, rehearsed(folder / "cache", address, "0,1"), "-m", "dvc", "repro")
    (folder / "log").write_text(said)
    return top


def test_every_stage_ends_in_its_outputs(ran):
    scores = json.loads((ran / "metrics/benchmark.json").read_text())
    assert list(scores) == ["random", "base", "rl"]
    rows = [json.loads(line) for line in (ran / "data/sft/train.jsonl").open()]
    assert len(rows) > 20 and rows[0]["messages"][0]["role"] == "system"
    for name in ("sft", "distill", "rl"):
        assert (ran / "models" / name / "adapter_model.safetensors").stat().st_size > 10_000
    metrics = json.loads((ran / "metrics/rl.json").read_text())
    assert metrics["iterations"] == 2 and metrics["stopped"] is None
    assert (ran / "metrics/report.html").stat().st_size > 100_000
    assert len((ran / "metrics/plots/agreement.csv").read_text().splitlines()) > 1
