"""The results in a terminal: in 80 columns, beside what is committed, with where the time went and what to do next."""

import json
import subprocess
from pathlib import Path

import pytest

from apprentice import params, store
from apprentice.params import Prompt
from apprentice.pipeline import ROOT
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.results import table

AGENTS = ("random", "gpt_4o_mini", "sft", "rl")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the pipeline leaves, as far as the table needs it."""
    monkeypatch.chdir(tmp_path)
    row = {"achievement_rate": 0.405, "achievement_rate_ci95": [0.373, 0.433], "crafter_score": 16.0, "reward": -8.25}
    row |= {"steps_mean": 1750.0, "invalid_rate": 0.01, "episodes": 64}
    pair = {"difference": 0.0739, "ci95": [0.029, 0.116], "p_holm": 0.003}
    files = {
        "benchmark": dict.fromkeys(AGENTS, row),
        "differences": {"rl - distill": pair, "rl - random": pair},
        "statistics": {"warnings": [f"{number} is too little to say anything about" for number in range(15)]},
        "summary": {"achievement_rate": {"random": 11.72, "rl": 44.5}},
        "times/rl": {"seconds": 599.0, "cores": 2},
        "times/benchmark_student-sft": {"seconds": 60.0, "cores": 2},
        "times/benchmark_student-rl": {"seconds": 70.0, "cores": 2},
        "times/score": {"seconds": 1.0, "cores": 2},
    }
    for name, values in files.items():
        path = Path(f"metrics/{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    episodes = play(Scripted("expert"), Spec([200003, 200001, 200002], 40, Prompt(), "rl"))
    store.write(Path("data/benchmark/rl.parquet"), episodes)
    return {episode.seed: len(episode.unlocked) for episode in episodes}


def shown(capsys) -> str:
    table.show(params.load(ROOT / "params.yaml"))
    return capsys.readouterr().out


def test_all_of_it_fits_into_80_columns(folder, capsys):
    said = shown(capsys)
    assert max(map(len, said.splitlines())) <= 80
    for part in ("gpt_4o_mini", "40.5%", "37.3 to 43.3%", "16.0", "-8.25", "1750", "1.0%", "64 held-out worlds"):
        assert part in said, part
    assert "rl minus distill: +7.4 points (+2.9 to +11.6), p = 0.003" in said and "rl minus random" not in said
    assert said.count("is too little") == 3 and "12 more notes" in said


def test_what_is_committed_stands_beside_it(folder, capsys):
    assert "mitted" not in shown(capsys)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "metrics/summary.json"], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *command], check=True)
    Path("metrics/summary.json").write_text("{}")
    said = shown(capsys)
    rows = {line.split()[0]: line for line in said.splitlines() if "37.3 to" in line}
    assert "44.5%" in rows["rl"] and "11.7%" in rows["random"] and max(map(len, said.splitlines())) <= 80


def test_where_the_time_went_is_by_stage_the_longest_first(folder, capsys):
    said = shown(capsys)
    rl, students, together = (said.index(part) for part in ("9:59 min  82%", "2:10 min  18%", "12:10 min"))
    assert rl < students < together


def test_three_commands_come_next(folder, capsys):
    best = max(sorted(folder), key=folder.get)
    said = shown(capsys).partition("what next")[2]
    for command in (
        "  metrics/report.html",
        f"  apprentice play rl --seed {best}",
        "  dvc exp run -S profiles.tiny.rl.",
    ):
        assert command in said
