"""OpenEnv's own validator passes `apprentice serve world`, and its clients, which TRL's environments use, play there.

Run by `make test-openenv`, which sets up the client's environment; not part of `make test`.
"""

import base64
import hashlib
import json
import os
import subprocess

import numpy as np
import pytest
from test_serve_world import KEY, serving

from apprentice.pipeline import ROOT
from apprentice.world import ACTIONS, World, png

PYTHON = ROOT / ".venv-openenv/bin/python"
EPISODE = ROOT / "tests/environment/openenv_episode.py"


@pytest.mark.parametrize("key", [{}, {"APPRENTICE_SERVE_KEY": KEY}], ids=["open", "with a key"])
def test_openenvs_clients_play_the_episode_that_the_world_plays(tmp_path, key):
    actions = [ACTIONS[number] for number in np.random.default_rng(0).integers(17, size=40)]
    world = World(17, max_steps=len(actions))
    expected = [[digest(world.reset().image), None, False]]
    for action in actions:
        outcome = world.step(action)
        expected.append([digest(outcome.observation.image), outcome.reward, outcome.done])
    with serving(tmp_path, "world", **key) as (url, _):
        script = [PYTHON, EPISODE, url, "17", *actions]
        done = subprocess.run(script, env=os.environ | key, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (typed, steps), (generic, said) = json.loads(done.stdout)
    assert typed == expected and steps == len(actions)
    assert generic == expected and "VALIDATION_ERROR" in said and "'noop'" in said


def test_openenvs_validator_passes(tmp_path):
    with serving(tmp_path, "world") as (url, _):
        command = [PYTHON.with_name("openenv"), "validate", "--url", url, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["passed"], done.stdout
    assert report["summary"]["passed_count"] == report["summary"]["total_count"] >= 6


def test_openenvs_client_of_tools_plays_the_session_that_it_resets(tmp_path):
    with serving(tmp_path, "world") as (url, _):
        script = [PYTHON, EPISODE.with_name("openenv_tools.py"), url]
        done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tools, result, steps = json.loads(done.stdout)
    world = World(7)
    world.reset()
    last = [world.step(action) for action in ("move_left", "do")][-1]
    assert tools == ["act"] and steps == 2
    assert result["content"][1]["data"] == base64.b64encode(png.encode(last.observation.image)).decode()


def test_openenvs_client_says_that_a_server_is_gone(tmp_path):
    with serving(tmp_path, "world") as (url, _):
        pass
    done = subprocess.run(
        [PYTHON, EPISODE, url, "1", "noop"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode and "ConnectionError: Failed to connect" in done.stderr


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(base64.b64encode(png.encode(image))).hexdigest()
