"""`apprentice traces`: what was played, listed, counted and shown, whatever a model has written into it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from command_line import run, write_params
from PIL import Image

from apprentice import store
from apprentice.cli import watch
from apprentice.episode import Episode, Reply
from apprentice.params import Prompt
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.training import rollouts


class Evil:
    """Says what no terminal should be told, beside a call that cannot be read."""

    name = "monkey"

    def begin(self, seed):
        return self

    async def reply(self, turn):
        return Reply({"role": "assistant", "content": "\x1b]0;owned\x07[bold]<tool_call>{"}, "stop", "m", 10, 3)

    def end(self):
        pass


@pytest.fixture(scope="module")
def played() -> dict[str, list[Episode]]:
    return {
        "expert": play(Scripted("expert"), Spec(range(4), 60, Prompt())),
        "monkey": play(Evil(), Spec([0, 1], 5, Prompt(mode="text+image"))),
    }


@pytest.fixture
def folder(tmp_path, played) -> Path:
    expert = {"policy": "expert", "seeds": "0-3"}
    write_params(tmp_path, expert=expert, monkey={"policy": "random", "seeds": "0-1"})
    for name, episodes in played.items():
        store.write(tmp_path / f"data/traces/{name}.parquet", episodes)
    store.write(tmp_path / "data/benchmark/random.parquet", play(Scripted("random"), Spec([200], 10, Prompt())))
    return tmp_path


def listed(folder: Path, *arguments: str) -> list[dict]:
    done = run(folder, "traces", "list", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_best_episodes_come_first(folder, played):
    found = listed(folder)
    assert len(found) == 6 and {one["agent"] for one in found} == {"expert", "monkey"}
    assert [len(one["achievements"]) for one in found] == sorted(
        (len(episode.unlocked) for episodes in played.values() for episode in episodes), reverse=True
    )
    by_id = {one["episode"]: one for one in found}
    for episodes in played.values():
        for episode in episodes:
            one = by_id[episode.id]
            assert one["achievements"] == list(episode.unlocked) and one["steps"] == episode.length
            assert one["reward"] == pytest.approx(episode.reward) and one["decisions"] == len(episode.steps)
            assert one["invalid"] == sum(bool(step.invalid) for step in episode.steps)


def test_filters_go_together(folder, played):
    assert {one["agent"] for one in listed(folder, "--teacher", "monkey")} == {"monkey"}
    wanted = {episode.id for episode in played["expert"] if "place_table" in episode.unlocked and episode.seed < 2}
    found = listed(folder, "--achievement", "place_table", "--seed", "0-1")
    assert {one["episode"] for one in found} == wanted and wanted
    most = max(len(episode.unlocked) for episode in played["expert"])
    assert all(len(one["achievements"]) == most for one in listed(folder, "--min-achievements", str(most)))
    assert [one["agent"] for one in listed(folder, "--benchmark")] == ["random"]


def test_the_table_says_how_much_it_left_out(folder):
    done = run(folder, "traces", "list", "--limit", "2")
    assert "6 episodes, 2 of them shown" in done.stdout and done.stdout.count("expert-") == 2


def test_statistics_are_of_the_chosen_episodes(folder, played):
    found = json.loads(run(folder, "traces", "stats", "--json").stdout)
    episodes = played["expert"]
    assert found["expert"]["episodes"] == 4 and found["monkey"]["invalid_rate"] == 1.0
    assert found["expert"]["achievements_mean"] == sum(len(episode.unlocked) for episode in episodes) / 4
    with_table = sum("place_table" in episode.unlocked for episode in episodes) / 4
    assert found["expert"]["achievements"]["place_table"] == with_table
    assert found["monkey"]["prompt_tokens"] == 100 and found["monkey"]["completion_tokens"] == 30
    assert "place table" not in run(folder, "traces", "stats").stdout  # the achievement's own name
    assert json.loads(run(folder, "traces", "stats", "--json", "--seed", "99").stdout)["expert"]["episodes"] == 0


def test_an_episode_is_shown_decision_by_decision(folder, played):
    episode = played["expert"][2]
    done = run(folder, "traces", "show", "expert-2")
    lines = done.stdout.splitlines()
    assert len(lines) == len(episode.steps) + 1
    step = next(step for step in episode.steps if step.unlocked)
    assert f"{step.step:5d}  {step.executed[0]}" in lines[episode.steps.index(step)]
    assert f"unlocked {step.unlocked[0]}" in lines[episode.steps.index(step)]
    decisions = json.loads(run(folder, "traces", "show", "expert-2", "--json").stdout)
    assert [one["executed"] for one in decisions] == [list(step.executed) for step in episode.steps]


def test_a_decision_is_shown_with_all_the_player_saw_and_said(folder):
    shown = run(folder, "traces", "show", "expert-2", "--step", "3").stdout
    assert "system:" in shown and "(the picture)" in shown and "health 9 food 9" in shown and '"act"' in shown


def test_what_a_model_wrote_does_nothing_to_the_terminal(folder):
    for arguments in (["show", "monkey-0"], ["show", "monkey-0", "--step", "1"], ["list"], ["stats"]):
        done = run(folder, "traces", *arguments)
        assert done.returncode == 0 and "\x1b]" not in done.stdout and "\x07" not in done.stdout
    assert "owned" in run(folder, "traces", "show", "monkey-0", "--step", "1").stdout


def test_an_episode_becomes_a_film(folder, played):
    assert run(folder, "traces", "show", "expert-1", "--gif", "one.gif").returncode == 0
    with Image.open(folder / "one.gif") as film:
        assert film.n_frames == played["expert"][1].length + 1


def test_a_benchmarks_opening_is_part_of_the_film():
    (episode,) = play(Scripted("random"), Spec([3], 10, Prompt(), opening=("noop",)))
    seen = list(watch.moments(episode, 72, ("noop",)))
    for moment, step in zip(seen, episode.steps, strict=False):
        assert (moment.image == step.observation.image).all()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["list", "--teacher", "x"], 2, "there is no 'x'; params.yaml has api, expert, monkey"),
        (["list", "--teacher", "api"], 2, "there is no data/traces/api.parquet yet; make it by dvc repro"),
        (["list", "--achievement", "fly"], 2, "'fly' is no achievement"),
        (["list", "--seed", "5-1"], 2, "runs backwards"),
        (["show", "expert-99"], 1, "there is no episode 'expert-99'"),
        (["show", "expert-1", "--step", "999"], 2, "has no decision at step 999"),
    ],
)
def test_what_is_not_there_is_one_sentence(folder, arguments, code, said):
    done = run(folder, "traces", *arguments)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr


def test_what_rl_plays_is_shown_while_it_plays_and_afterwards(folder, monkeypatch):
    monkeypatch.setenv("APPRENTICE_CACHE", str(folder / "cache"))
    for arguments, said in (
        (["list"], "rl has played no iteration"),
        (["stats", "--benchmark"], "leave out --benchmark"),
    ):
        done = run(folder, "traces", *arguments, "--rl")
        assert done.returncode and said in done.stderr and "Traceback" not in done.stderr
    [other, ours] = [folder / f"cache/rl/{name}/rollouts" for name in ("before", "now")]
    episodes = play(Scripted("expert"), Spec([300_000, 300_001], 8, Prompt()))
    for number, episode in enumerate(episodes):
        group = [(episode, np.zeros(len(episode.steps)))]
        rollouts.write(other / f"{number:05}.parquet", group, number)
        rollouts.write(ours / f"{number:05}.parquet", group, 7 + number)
    os.utime(other, (0, 0))
    found = listed(folder, "--rl")
    assert {one["episode"] for one in found} == {"rl-7-300000-0", "rl-8-300001-0"}
    done = run(folder, "traces", "show", "rl-8-300001-0", "--rl", "--gif", "rl.gif")
    assert done.returncode == 0 and (folder / "rl.gif").stat().st_size > 1000, done.stderr
    rollouts.join(sorted(other.glob("*.parquet")), folder / "data/rl/rollouts.parquet")
    assert [one["episode"] for one in listed(folder, "--rl", "--seed", "300001")] == ["rl-1-300001-0"]
