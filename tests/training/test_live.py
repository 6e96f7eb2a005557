"""While a trainer works: its curves grow, metrics/live.json says where it is, and its own bars are gone."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from apprentice.stage import write_curve, write_metrics
from apprentice.training.live import Live, reporting


class Trainer:
    """A trainer as far as its callbacks go."""

    def __init__(self):
        self.callbacks = [PrinterCallback(), ProgressCallback()]
        self.state = TrainerState(is_world_process_zero=True, max_steps=4)

    def remove_callback(self, kind) -> None:
        self.callbacks = [one for one in self.callbacks if not isinstance(one, kind)]

    def add_callback(self, one) -> None:
        self.callbacks.append(one)

    def train(self, steps: int):
        def call(event: str, **more) -> None:
            for one in self.callbacks:
                getattr(one, event)(SimpleNamespace(), self.state, SimpleNamespace(), **more)

        call("on_train_begin")
        for step in range(self.state.global_step + 1, steps + 1):
            self.state.global_step = step
            call("on_step_end")
            logs = {"loss": 1 / step, "mean_token_accuracy": 0.5}
            self.state.log_history.append(logs | {"step": step})
            call("on_log", logs=logs)
            yield step


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Trainer()


def live(trainer: Trainer) -> Live:
    return Live(
        trainer,
        "sft",
        lambda: ({"step": 4 - trainer.state.global_step}, trainer.state.global_step),
        lambda history: write_curve("sft_train", history, {"loss": "loss"}),
        {"loss": ("loss", ".3f")},
        stays="loss",
    )


def test_curves_grow_and_the_file_says_where_it_is(trainer, capfd):
    shown = live(trainer)
    assert not any(isinstance(one, (PrinterCallback, ProgressCallback)) for one in trainer.callbacks)
    for step in trainer.train(4):
        assert len(Path("metrics/plots/sft_train.csv").read_text().splitlines()) == 1 + step
        assert json.loads(Path("metrics/live.json").read_text()) == {
            "stage": "sft",
            "step": step,
            "of": 4,
            "loss": 1 / step,
        }
    shown.close()
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "sft 1/4: loss 1.000"  # the first step says nothing of how long the others take
    assert lines[-1] == "sft 4/4: loss 0.250" and len(lines) == 4


def test_a_stage_that_has_ended_is_no_longer_live(trainer):
    write_metrics("live", {"stage": "rl", "iteration": 3})
    for stage, left in {"sft": {"stage": "rl", "iteration": 3}, "rl": {}}.items():
        code = f"import sys; sys.argv = ['{stage}.py']; from apprentice.stage import run\ndef main(): 1 / 0\nrun(main)"
        subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert json.loads(Path("metrics/live.json").read_text()) == left


def test_what_is_taken_up_is_said(trainer, capfd):
    trainer.state.global_step = 4
    shown = live(trainer)
    assert not list(trainer.train(4))
    shown.close()
    assert capfd.readouterr().err == (
        "sft: 4 of 4 steps are kept from before, which is all; to begin anew: apprentice cache clear sft\n"
    )


def test_no_other_rank_shows_or_writes_anything(trainer, capfd):
    trainer.state.is_world_process_zero = False
    shown = live(trainer)
    assert list(trainer.train(4)) == [1, 2, 3, 4]
    shown.close()
    assert not capfd.readouterr().err and not Path("metrics").exists()


def test_the_trainers_arguments_name_who_is_reported_to(trainer, monkeypatch):
    assert reporting("rl")["report_to"] == "none"
    Path("compute.yaml").write_text("report_to: [tensorboard]")
    monkeypatch.setattr("apprentice.compute.find_spec", lambda name: True)
    assert reporting("rl") == {"report_to": ["tensorboard"], "run_name": "rl", "project": "apprentice"}
