"""Protocols are kept, any model may play, and its replies are paid for once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from endpoint import Server
from ruamel.yaml import YAML

from apprentice import store
from apprentice.params import Prompt
from apprentice.pipeline import ROOT
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.world import World

SETTINGS = {"seeds": "200000-200001", "max_steps": 6}


def checkout(folder: Path, **benchmark) -> Path:
    tree = YAML(typ="safe").load(ROOT / "params.yaml")
    tree["benchmark"] |= SETTINGS | benchmark
    YAML(typ="safe").dump(tree, folder / "params.yaml")
    return folder


def benchmark(folder: Path, name: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "stages/benchmark.py", name],
        cwd=folder,
        env=os.environ | {"APPRENTICE_CACHE": str(folder / "cache")} | environment,
        capture_output=True,
        text=True,
    )


def model(server: Server, **changes) -> dict:
    asked = {"base_url": server.url, "model": "gpt-4o-mini", "api_key_env": None, "temperature": 1.0}
    return {"gpt": {"policy": "chat", "prompt": {"mode": "text"}, "endpoint": asked | changes}}


def test_balrogs_noop_before_the_first_decision_is_not_counted():
    (episode,) = play(Scripted("random"), Spec([3], 5, Prompt(), opening=("noop",)))
    world = World(3)
    world.reset()
    first = world.step("noop").observation
    assert (episode.steps[0].observation.image == first.image).all()
    assert episode.steps[0].observation.daylight == first.daylight
    assert episode.steps[0].step == 0 and episode.steps[0].history == () and episode.length == 5
    assert episode.steps[-1].done
    (without,) = play(Scripted("random"), Spec([3], 5, Prompt()))
    assert without.steps[0].observation.daylight != first.daylight


def test_any_model_behind_an_api_plays_and_is_paid_for_once(tmp_path):
    with Server() as server:
        top = checkout(tmp_path, agents=model(server))
        done = benchmark(top, "gpt")
        assert done.returncode == 0, done.stderr
        asked = len(server.requests)
        assert asked == 2 * 6
        before = (top / "data/benchmark/gpt.parquet").read_bytes()
        done = benchmark(top, "gpt")
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == asked and (top / "data/benchmark/gpt.parquet").read_bytes() == before
    took = json.loads((top / "metrics/benchmark/gpt.json").read_text())
    assert took["episodes"] == 2 and took["decisions"] == 12 and took["cost_usd"] > 0
    assert [episode.seed for episode in store.read(top / "data/benchmark/gpt.parquet")] == [200000, 200001]


def test_a_model_plays_by_the_protocol_too(tmp_path):
    with Server() as server:
        top = checkout(tmp_path, agents=model(server), protocol="balrog", seeds="200000-200009", max_steps=2)
        done = benchmark(top, "gpt")
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == 20
    episode = next(iter(store.read(top / "data/benchmark/gpt.parquet")))
    world = World(200000)
    world.reset()
    assert episode.steps[0].observation.daylight == world.step("noop").observation.daylight


@pytest.mark.parametrize("name", ["gpt", "nobody"])
def test_what_is_missing_is_said_before_anything_is_played(tmp_path, name):
    with Server() as server:
        top = checkout(tmp_path, agents=model(server, api_key_env="NO_SUCH_KEY"))
        done = benchmark(top, name)
        assert done.returncode == 2 and not server.requests
    wanted = "benchmark.agents.gpt.endpoint: the environment variable NO_SUCH_KEY" if name == "gpt" else "'nobody'"
    assert wanted in done.stderr and not (top / "data").exists() and not (top / "metrics").exists()
