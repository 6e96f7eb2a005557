"""RL plays and updates alike with any number of ranks and after any kill; a run that goes wrong stops and says so."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHOWN
from safetensors.torch import load_file
from small import SMALL, checkout, on_cores

from apprentice import params, store
from apprentice.ledger import Ledger
from apprentice.pipeline import ROOT
from apprentice.play import Spec
from apprentice.policy import Turn
from apprentice.serving.in_process import InProcess, generate, shown
from apprentice.student.encoding import batch
from apprentice.training import rollouts
from apprentice.training.self_play import SelfPlay
from apprentice.world.world import World

sys.path.append(str(ROOT / "stages"))

SEEDS = [1, 1, 2, 2, 3, 3]


def share(tiny, ledger: Ledger, rank: int = 0, ranks: int = 1, remote: bool = False) -> dict:
    def policy(place: int):
        local = InProcess("student", *tiny, 1.0, 4, random_seed=place)
        return Remote(local) if remote else local

    return rollouts.play_share(policy, Spec(SEEDS, 3, SHOWN, together=2, fingerprint="x"), ledger, rank, ranks)


class Remote:
    """A policy whose answers don't depend on who else asks, as a server's."""

    name = "student"

    def __init__(self, local: InProcess):
        self._local = local

    def begin(self, seed: int):
        return self._local.begin(seed)


KEYS = [f"x {place}" for place in range(len(SEEDS))]


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_played_does_not_depend_on_ranks(tiny, remote):
    with Ledger("one") as one, Ledger("two") as two:
        assert sorted(share(tiny, one, remote=remote)) == [0, 1, 2, 3, 4, 5]
        # Companies stay together; where there are none, all ranks have as many.
        assert sorted(share(tiny, two, 0, 2, remote)) == ([0, 2, 4] if remote else [0, 1, 4, 5])
        assert sorted(share(tiny, two, 1, 2, remote)) == ([1, 3, 5] if remote else [2, 3])
        assert list(one.records(KEYS)) == list(two.records(KEYS))
        actions = [[step.reply.message for step in episode.steps] for episode in rollouts.read(one, "x", range(6))]
    assert actions[0] != actions[1]  # a group's episodes are different ones


@pytest.mark.parametrize(("remote", "again"), [(False, [2, 3]), (True, [3])])
def test_after_a_kill_only_what_is_missing_is_played(tiny, remote, again):
    """In process, with those it was played with; on a server, alone. It's the same episode."""
    with Ledger("whole") as whole, Ledger("killed") as killed:
        share(tiny, whole, remote=remote)
        for key, record in zip(KEYS, whole.records(KEYS), strict=True):
            if key != "x 3":
                killed.add(key, record)
        assert list(share(tiny, killed, remote=remote)) == again
        assert list(killed.records(KEYS)) == list(whole.records(KEYS))
        assert share(tiny, killed, remote=remote) == {}


def test_a_decision_read_back_is_trained_on_as_it_was_sampled(tiny):
    _, processor = tiny
    with Ledger("kept") as ledger:
        played = share(tiny, ledger)
        for place, episode in enumerate(rollouts.read(ledger, "x", range(len(SEEDS)))):
            for before, after in zip(played[place].steps, episode.steps, strict=True):
                one, other = rollouts.encoded([before, after], SHOWN, processor)
                assert (one.prompt_ids, one.answer_ids) == (other.prompt_ids, other.answer_ids)
                assert torch.equal(one.pixel_values, other.pixel_values)
                assert before.reply.sample.logprobs == after.reply.sample.logprobs
                assert np.array_equal(before.reply.sample.hidden, after.reply.sample.hidden)


def test_the_hidden_state_is_what_the_first_token_is_drawn_from(tiny):
    model, processor = tiny
    with Ledger("hidden") as ledger:
        sample = share(tiny, ledger)[0].steps[0].reply.sample
    inputs = batch(processor, [sample.encoded])
    del inputs["labels"]
    place = len(sample.encoded.prompt_ids) - 1
    with torch.no_grad():
        logits = model(**inputs).logits[0, place]
        np.testing.assert_allclose(model.lm_head(torch.tensor(sample.hidden)), logits, atol=1e-4)


def test_hidden_states_that_play_did_not_show_are_computed_for_all_at_once_and_kept(tiny, monkeypatch):
    """Of an engine like vLLM: each rank computes its share, in batches over all episodes, and a kill costs none."""
    model, processor = tiny
    sampler = SimpleNamespace(shows_hidden=False)
    spec = Spec(SEEDS, 3, SHOWN, together=2, fingerprint="x")

    def rank(number: int) -> SelfPlay:
        trainer = SimpleNamespace(
            model=SimpleNamespace(get_base_model=lambda: model),
            processing_class=processor,
            accelerator=SimpleNamespace(process_index=number, num_processes=2, unwrap_model=lambda model: model),
            args=SimpleNamespace(per_device_train_batch_size=4),
            to_device=lambda value: value,
        )
        play = SelfPlay.__new__(SelfPlay)
        play.trainer, play.sampler = trainer, sampler
        return play

    with Ledger("apart") as ledger:
        played = share(tiny, ledger, remote=True)
        rank(1)._add_hidden(ledger, spec)
        done = ledger.keys()
        assert [rollouts.hidden_key("x", place) in done for place in range(4)] == [False, True, False, True]
        rank(0)._add_hidden(ledger, spec)
        asked: list[int] = []
        monkeypatch.setattr(rollouts, "encoded", lambda steps, *_: asked.append(len(steps)))
        rank(0)._add_hidden(ledger, spec)
        assert not asked  # nothing is computed again
        for place, episode in rollouts.with_hidden(ledger, "x", played).items():
            for step, before in zip(episode.steps, played[place].steps, strict=True):
                np.testing.assert_allclose(step.reply.sample.hidden, before.reply.sample.hidden, atol=1e-5)


def test_play_asks_for_the_last_hidden_state_alone(tiny, monkeypatch):
    """The same bytes as with those of all layers, which take as much memory again for each layer."""
    model, processor = tiny
    [turn] = [Turn(World(1).reset(), (), SHOWN)]
    asked, forward = [], model.forward

    def spied(*args, **kwargs):
        asked.append(forward(*args, **kwargs | {"output_hidden_states": len(asked) == 0}))
        assert not kwargs.get("output_hidden_states")
        return asked[-1]

    monkeypatch.setattr(model, "forward", spied)
    [(_, _, hidden)] = generate(model, processor, shown(processor, [turn]), np.zeros((1, 2)), 1.0)
    np.testing.assert_array_equal(hidden, asked[0].hidden_states[-1][0, -1].numpy())


@pytest.mark.parametrize("setting", [False, True])
def test_checkpointing_is_what_the_settings_say_on_any_device(tmp_path, setting):
    import rl as stage

    profile = params.load(ROOT / "params.yaml").profiles["tiny"]
    profile = profile.model_copy(update={"rl": profile.rl.model_copy(update={"gradient_checkpointing": setting})})
    assert bool(stage.arguments(profile, tmp_path, 8, 1).gradient_checkpointing) == setting


def test_rollouts_are_a_trace_with_advantages(tiny, tmp_path):
    with Ledger("trace") as ledger:
        played = share(tiny, ledger)
    for iteration in (0, 1):
        group = [(played[place], np.arange(len(played[place].steps)) - 0.5) for place in (0, 1)]
        rollouts.write(tmp_path / f"{iteration}.parquet", group, iteration)
    rollouts.join([tmp_path / "0.parquet", tmp_path / "1.parquet"], tmp_path / "rollouts.parquet")
    table = pq.read_table(tmp_path / "rollouts.parquet")
    assert table.column_names == [*store.SCHEMA.names, "advantage", "iteration"]
    assert table["advantage"].to_pylist()[:2] == [-0.5, 0.5]
    episodes = list(store.read(tmp_path / "rollouts.parquet"))
    assert [episode.id for episode in episodes] == ["rl-0-1-0", "rl-0-1-1", "rl-1-1-0", "rl-1-1-1"]
    assert episodes[0].steps[0].observation.image.shape == (72, 72, 3)


@pytest.fixture(scope="module")
def adapted(tiny_folder, tmp_path_factory) -> Path:
    """models/base and models/distill of an untrained student."""
    from peft import LoraConfig, get_peft_model

    from apprentice.student import loading

    models = tmp_path_factory.mktemp("adapted") / "models"
    shutil.copytree(tiny_folder, models / "base")
    torch.manual_seed(0)
    model, _ = loading.load(models / "base")
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", exclude_modules=".*visual.*")).save_pretrained(
        models / "distill"
    )
    return models


TRAINED = SMALL | {
    "profiles.tiny.prompt": {"mode": "image", "rules": False, "history": 2},
    "profiles.tiny.rl.iterations": 2,
    "profiles.tiny.rl.max_steps": 8,
    "profiles.tiny.rl.evaluation": {"seeds": "310000-310001", "every": 2},
}


def train(top: Path, models: Path, cores: int, changes: dict) -> subprocess.CompletedProcess:
    checkout(top, TRAINED | changes)
    shutil.copytree(models, top / "models")
    return on_cores(top, cores, "stages/rl.py")


def run_and_last_adapter(top: Path, models: Path, cores: int, changes: dict) -> dict[str, torch.Tensor]:
    done = train(top, models, cores, changes)
    assert done.returncode == 0, done.stderr[-3000:]
    (checkpoint,) = top.glob("cache/rl/*/checkpoint-4")
    return load_file(checkpoint / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("bound", "value", "what", "iterations"),
    [
        ("max_invalid_rate", 0.0, "the share of invalid replies was", 1),
        ("max_kl", 1e-12, "the KL divergence to the policy at the start was", 2),  # in the first it's 0
        ("max_sampler_mismatch", 1e-12, "the sampler's distance from the trainer was", 1),
    ],
)
def test_a_run_that_leaves_its_bounds_stops_and_gives_the_best_adapter(
    adapted, tmp_path, bound, value, what, iterations
):
    changes = {f"profiles.tiny.rl.{bound}": value, "profiles.tiny.rl.iterations": 4}
    done = train(tmp_path / "top", adapted, 1, changes | {"profiles.tiny.rl.evaluation.every": 4})
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"STOPPED EARLY: {what}" in done.stdout
    metrics = json.loads((tmp_path / "top/metrics/rl.json").read_text())
    assert f"above the bound of {value:g}" in metrics["stopped"] and metrics["best_iteration"] == 0
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapted / "distill", tmp_path / "top/models/rl")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "top/data/rl/rollouts.parquet").exists()
    assert len((tmp_path / "top/metrics/plots/rl.csv").read_text().splitlines()) == 1 + iterations


def test_a_base_in_4_bits_is_trained_on_and_played_with_whole(adapted, tmp_path):
    """QLoRA: the sampler's own copy has the whole weights, and the ratio to the trainer's corrects for that."""
    changes = {"quantization": "nf4", "iterations": 2, "max_sampler_mismatch": 10.0}
    done = train(tmp_path / "top", adapted, 1, {f"profiles.tiny.rl.{name}": value for name, value in changes.items()})
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "top/metrics/plots/rl_training.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 2 and np.isfinite([list(row.values()) for row in rows]).all()
    assert 1e-5 < rows[0]["sampler_mismatch"] < 1
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (adapted / "distill", next((tmp_path / "top").glob("cache/rl/*/checkpoint-4")))
    )
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
