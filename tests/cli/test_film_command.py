"""`apprentice film`, and the figure of `apprentice report`: pictures of what the benchmark has recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run, write_params
from PIL import Image

from apprentice import store
from apprentice.cli import watch
from apprentice.params import Prompt
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted

SEEDS = (200200, 200201, 200202)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkout in which random and noop have played for the benchmark, noop for fewer steps."""
    top = tmp_path_factory.mktemp("played")
    write_params(top)
    for name, steps in (("random", 12), ("noop", 8)):
        store.write(top / f"data/benchmark/{name}.parquet", play(Scripted(name), Spec(SEEDS, steps, Prompt(), name)))
    return top


def test_players_are_side_by_side_until_the_last_one_ends(folder):
    done = run(folder, "film", "noop", "random", "--seed", "200201", "--out", "a.gif", "--out", "films/a.mp4")
    assert done.returncode == 0, done.stderr
    assert "noop, random on world 200201" in done.stdout
    (episode,) = play(Scripted("random"), Spec([200201], 12, Prompt()))
    *_, last = watch.moments(episode, 216)
    with Image.open(folder / "a.gif") as film:
        assert (film.n_frames, film.width) == (13, 216 + 8 + 216)
        film.seek(12)
        right = np.asarray(film.convert("RGB"))[:216, 224:]
    assert np.abs(right.astype(int) - last.image).mean() < 8  # of 48 colours
    assert (folder / "films/a.mp4").stat().st_size > 1000


def test_without_a_seed_it_is_the_last_players_median_world(folder):
    ranked = sorted((count, seed) for seed, count in store.outcomes(folder / "data/benchmark/random.parquet"))
    done = run(folder, "film", "noop", "random", "--out", "b.gif")
    assert f"on world {ranked[1][1]}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nobody", "--out", "a.gif"), "has no agent 'nobody'; it has "),
        (("random", "--out", "a.avi"), "must end in .gif or .mp4"),
        (("random", "--seed", "7", "--out", "a.gif"), "has not played this world"),
        (("expert", "--out", "a.gif"), "run dvc repro first"),
    ],
)
def test_what_cannot_be_filmed_is_said(folder, arguments, said):
    done = run(folder, "film", *arguments)
    assert done.returncode in (1, 2) and said in done.stderr


def test_the_figure_has_each_agents_rate_and_is_the_same_bytes_again(folder):
    rows = {"base": (0.09, 0.08, 0.1), "rl": (0.404, 0.373, 0.433)}
    (folder / "metrics").mkdir()
    scores = {name: {"achievement_rate": rate, "achievement_rate_ci95": ci} for name, (rate, *ci) in rows.items()}
    (folder / "metrics/benchmark.json").write_text(json.dumps(scores))
    figures = []
    for name in ("a.svg", "b.svg", "c.png"):
        done = run(folder, "report", "--out", name)
        assert done.returncode == 0, done.stderr
        figures.append((folder / name).read_bytes())
    assert figures[0] == figures[1] and figures[2].startswith(b"\x89PNG")
    for words in ("base", "rl", "9.0 %", "40.4 %", "95 % interval"):
        assert words in figures[0].decode()
    done = run(folder, "report", "--out", "a.svg", "--worlds", "200200")
    assert done.returncode == 2 and "--worlds is for replays" in done.stderr
