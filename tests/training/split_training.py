"""SFT as the stage does it: the same losses however a batch is split, with DeepSpeed, and after a kill of all ranks.

Run by `make test-deepspeed`: minutes of CPU, so not a part of `make test`.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from conftest import SHOWN
from safetensors.torch import load_file
from torch import multiprocessing

from apprentice import params
from apprentice.data.chat_rows import row
from apprentice.data.dataset import write_jsonl
from apprentice.pipeline import ROOT
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.training import devices, examples

sys.path.append(str(ROOT / "stages"))
STEPS = 20
KNOWN = {"train": "train", "val": "val"}


@pytest.fixture(scope="module", autouse=True)
def forked():
    """Ranks are forks of one process: each would import TRL and DeepSpeed for 8 seconds."""
    multiprocessing.set_forkserver_preload(["trl.trainer.sft_trainer", "peft", "deepspeed"])
    start = multiprocessing.start_processes

    def fork(work, args, *how, **settings):
        return start(_inheriting, (dict(os.environ), work, args), *how, **settings | {"start_method": "forkserver"})

    with patch.object(multiprocessing, "start_processes", fork):
        yield


def _inheriting(rank: int, environment: dict[str, str], work, args: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work(rank, *args)


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory) -> Path:
    """What the stage reads: a base model, and rows whose answers have from 6 to dozens of tokens."""
    return inputs(tmp_path_factory.mktemp("made"), tiny_folder, [SHOWN])


@pytest.fixture(scope="module")
def mixed(tiny_folder, tmp_path_factory) -> Path:
    """The same, but every other row has no picture, as those of an import."""
    return inputs(tmp_path_factory.mktemp("mixed"), tiny_folder, [SHOWN, params.Prompt(mode="text", rules=False)])


def inputs(top: Path, base: Path, shown: list[params.Prompt]) -> Path:
    shutil.copytree(base, top / "models/base")
    episodes = play(Scripted("expert", rationale=True), Spec([3, 4], 90, SHOWN))
    for name, episode in zip(KNOWN, episodes, strict=True):
        rows = [row(episode, step, shown[step.step % len(shown)], step.step % 3 == 0) for step in episode.steps]
        write_jsonl(top / f"data/sft/{name}.jsonl", rows[: 90 if name == "train" else 21])
    return top


def train(top: Path, ranks: int, at_once: int, accumulation: int, stage: int, steps: int = STEPS, **changes) -> None:
    """A batch of 8 rows in each step, split like this; top: the folder to train in. changes: of settings of sft."""
    os.chdir(top)
    profile = params.load(ROOT / "params.yaml").profiles["tiny"]
    settings = {"eval_steps": 10, "early_stopping_patience": None, "batch_size": 8, "micro_batch_size": at_once}
    worlds = params.SftEvaluation(seeds=(1, 2, 3), max_steps=5, keep="loss")
    settings["evaluation"] = worlds if stage < 3 else None
    sft = profile.sft.model_copy(update=settings | {"zero": params.Zero(stage=stage)} | changes)
    profile = profile.model_copy(update={"sft": sft, "dtype": "float32"})
    import sft as stage_sft

    for name, file in stage_sft.DATA.items():
        examples.survey(file, stage_sft.BASE, KNOWN[name])
    arguments = profile, KNOWN, 0, top / "checkpoints", at_once, accumulation, (), False
    devices.launch(_rank, ranks, steps, *arguments, group=stage > 0)


def _rank(steps: int, *arguments) -> None:
    import sft as stage_sft

    from apprentice.training import sft

    short = partial(sft.SFTConfig, max_steps=steps)
    with patch.object(sft, "SFTConfig", lambda **settings: short(**settings | {"logging_steps": 1})):
        stage_sft.train(*arguments)


def curve(top: Path, name: str) -> np.ndarray:
    with (top / f"metrics/plots/sft_{name}.csv").open() as file:
        return np.array([float(entry["loss"]) for entry in csv.DictReader(file)])


@pytest.fixture
def trained(made, tmp_path, monkeypatch):
    def trained(name: str, *split, rows: Path = made, **changes) -> Path:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(rows, tmp_path / name)
        train(tmp_path / name, *split, **changes)
        return tmp_path / name

    return trained


def test_a_batch_has_the_same_loss_however_it_is_split(trained):
    whole = trained("whole", 1, 8, 1, 0)
    others = {
        "two ranks, ZeRO-2": trained("zero2", 2, 4, 1, 2),
        "two ranks, ZeRO-2, the optimizer in the host's memory": trained(
            "offloaded", 2, 4, 1, 2, zero=params.Zero(stage=2, offload=True)
        ),
        "two ranks, ZeRO-3": trained("zero3", 2, 2, 2, 3),
        "four parts": trained("parts", 1, 2, 4, 0),
    }
    assert len(curve(whole, "train")) == STEPS and len(curve(whole, "val")) == STEPS // 10
    assert len((whole / "metrics/plots/sft_held_out.csv").read_text().splitlines()) == 1 + STEPS // 10
    assert curve(whole, "train")[-5:].mean() < curve(whole, "train")[:5].mean()
    for how, other in others.items():
        for name in ("train", "val"):
            assert np.abs(curve(other, name) - curve(whole, name)).max() < 1e-4, (how, name)
    for name in ("zero2", "zero3"):
        shards = {file.name for file in (whole.parent / name).glob("checkpoints/checkpoint-20/global_step20/*")}
        assert sum("optim_states" in shard for shard in shards) == 2, "not divided among the ranks"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [0, 2])
def test_rows_without_pictures_are_trained_on_as_in_one_process_and_every_adapter_learns(
    trained, mixed, stage, checkpointing
):
    """In micro-batches of one row, in which one rank often has a picture and the other has none."""
    settings = {"steps": 3, "eval_steps": 3, "lora": params.Lora(rank=4, alpha=4, vision=True), "rows": mixed}
    whole = trained("whole", 1, 8, 1, 0, **settings)
    split = trained("split", 2, 1, 4, stage, gradient_checkpointing=checkpointing, **settings)
    for name in ("train", "val"):
        assert np.abs(curve(split, name) - curve(whole, name)).max() < 1e-4, name
    for name, weight in load_file(split / "models/sft/adapter_model.safetensors").items():
        assert weight.any(), name  # lora_B begins at 0


def test_a_kill_of_all_ranks_leaves_no_trace(trained, made, tmp_path):
    undisturbed = trained("undisturbed", 2, 4, 1, 2)
    killed = tmp_path / "killed"
    shutil.copytree(made, killed)
    code = "import sys, pathlib, split_training as t; t.train(pathlib.Path(sys.argv[1]), 2, 4, 1, 2)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, killed],
        cwd=ROOT / "tests/training",
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        start_new_session=True,
    )
    end = time.monotonic() + 600
    while not list(killed.glob("checkpoints/checkpoint-10/whole.json")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "models/sft").exists()
    train(killed, 2, 4, 1, 2)
    assert np.array_equal(curve(killed, "train"), curve(undisturbed, "train"))
    weights = "models/sft/adapter_model.safetensors"
    assert (killed / weights).read_bytes() == (undisturbed / weights).read_bytes()
