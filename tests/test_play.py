"""Playing records exactly what happened, records are never lost or played twice, and workers never outlive us."""

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from apprentice import prompt, store, world
from apprentice.cache import cache_folder
from apprentice.episode import HISTORY, Episode, Reply
from apprentice.errors import WorkError
from apprentice.files import digest
from apprentice.fingerprint import fingerprint
from apprentice.ledger import Ledger
from apprentice.params import Prompt
from apprentice.play import Spec, play, record
from apprentice.players.scripted import Scripted
from apprentice.workers import in_processes
from apprentice.world import ACHIEVEMENTS, ACTIONS, World, png

SHOWN = Prompt(max_actions=20, history=2)
NONSENSE = Reply({"role": "assistant", "content": "I would rather not."}, "stop", "grumpy", 7, 5)


def act(*actions: str) -> Reply:
    return Reply(prompt.answer(actions), "tool_calls", "scripted", 11, 3)


class Says:
    """Gives these replies in turn and then from the start again; an exception among them is raised."""

    def __init__(self, *replies: Reply | Exception, name: str = "says"):
        self.replies, self.name = replies, name
        self.turns, self.ended = [], 0

    def begin(self, seed: int) -> "Says":
        self.place = 0
        return self

    async def reply(self, turn) -> Reply:
        self.turns.append(turn)
        reply = self.replies[self.place % len(self.replies)]
        self.place += 1
        if isinstance(reply, Exception):
            raise reply
        return reply

    def end(self) -> None:
        self.ended += 1


class Counted:
    """Leaves a file for each episode that it begins, so that other processes' playing can be counted."""

    name = "counted"

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def begin(self, seed: int) -> Says:
        (self.folder / f"{seed}.{time.time_ns()}").touch()
        return Says(act(ACTIONS[seed % 5 + 1])).begin(seed)


def begun(folder: Path) -> list[int]:
    return sorted(int(file.stem) for file in folder.iterdir())


def one(policy, seed: int = 0, max_steps: int = 10, settings: Prompt = SHOWN, **options) -> Episode:
    return play(policy, Spec([seed], max_steps, settings, **options))[0]


def plain(value):
    """Everything in a record as what == compares exactly, array types and shapes included."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.name != "png"]  # the picture once more
        return [(name, plain(getattr(value, name))) for name in names]
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return type(value), value


@functools.cache
def varied() -> tuple[Episode, ...]:
    """Short episodes with all that a record can hold: achievements, sleep, death, invalid replies, exploration."""
    talkative = Reply(prompt.answer(["do"]) | {"content": "Zöge ich? 🪓\n\0"}, "tool_calls", "big", 900, 40)
    return (
        one(Scripted("expert"), seed=1, max_steps=60, agent="expert", explore=0.1),
        one(Scripted("noop"), seed=0, max_steps=400, agent="noop"),
        one(Says(NONSENSE, act("sleep", "do", "move_left"), talkative), seed=7, max_steps=45, agent="says"),
    )


def test_an_invalid_reply_costs_one_noop_and_the_episode_goes_on():
    episode = one(Says(act("move_left"), NONSENSE, act("move_right")), max_steps=6)
    assert [step.executed for step in episode.steps] == [("move_left",), ("noop",), ("move_right",)] * 2
    invalid = episode.steps[1]
    assert (invalid.asked, invalid.invalid, invalid.reply) == ((), "no tool call", NONSENSE)
    assert [step.invalid for step in episode.steps] == ["", "no tool call", ""] * 2


def test_an_expert_that_gives_reasons_plays_as_without():
    silent, telling = one(Scripted("expert"), 4, 80), one(Scripted("expert", rationale=True), 4, 80)
    assert [step.executed for step in telling.steps] == [step.executed for step in silent.steps]
    assert {step.reply.message["content"] for step in silent.steps} == {None}
    said = [step.reply.message["content"] for step in store.from_bytes(store.to_bytes(telling)).steps]
    assert said[0] == "Collect a sapling from the grass."
    assert len(set(said)) > 3 and not any(step.invalid for step in telling.steps)


def test_more_actions_than_the_prompt_allows_are_an_invalid_reply():
    episode = one(Says(act("do", "do")), max_steps=1, settings=Prompt(max_actions=1))
    assert "at most 1" in episode.steps[0].invalid
    assert episode.steps[0].executed == ("noop",)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "a smile cut in half: \ud83d"},
        {"role": "assistant", "content": [{"type": "text", "text": "I go."}]},
        {"role": "assistant", "content": 5},
        {"role": "assistant", "content": None, "tool_calls": 5},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "\ud83d", "arguments": "{"}}]},
        {},
        None,
    ],
    ids=["half a character", "parts", "number", "calls are a number", "half a name", "empty", "nothing"],
)
def test_whatever_a_policy_answers_is_played_and_recorded(message):
    episode = one(Says(Reply(message)), max_steps=2)
    assert [step.executed for step in episode.steps] == [("noop",)] * 2
    back = store.from_bytes(store.to_bytes(episode))
    assert [step.invalid for step in back.steps] == [step.invalid for step in episode.steps]
    assert all(step.invalid for step in back.steps)


def test_an_episode_is_what_its_executed_actions_do_in_a_world():
    """Rewards, health, achievements and pictures: played again by hand, action for action."""
    generator = np.random.default_rng(0)
    replies = [act(*generator.choice(ACTIONS, size=generator.integers(1, 5))) for _ in range(40)]
    for policy, explore in ((Says(*replies, NONSENSE), 0.3), (Scripted("expert"), 0.0)):
        episode = one(policy, seed=2, max_steps=70, explore=explore)
        again = World(2, max_steps=70)
        observation, count, unlocked, total = again.reset(), 0, (), 0.0
        for step in episode.steps:
            assert step.step == count
            assert plain(step.observation) == plain(observation)
            outcomes = [again.step(action) for action in step.executed]
            after = outcomes[-1]
            assert step.reward == sum(outcome.reward for outcome in outcomes)
            assert step.unlocked == tuple(name for outcome in outcomes for name in outcome.unlocked)
            assert step.health_change == after.observation.vitals["health"] - observation.vitals["health"]
            assert (step.done, step.died) == (after.done, after.died)
            observation, count = after.observation, count + len(outcomes)
            unlocked, total = unlocked + step.unlocked, total + step.reward
        assert again.done
        assert (episode.length, episode.unlocked, episode.reward) == (count, unlocked, total) == (70, unlocked, total)
    assert len(unlocked) > 2
    assert set(unlocked) <= set(ACHIEVEMENTS)
    assert len(set(unlocked)) == len(unlocked)


def test_what_is_left_of_a_reply_when_the_episode_ends_is_dropped():
    episode = one(Says(act(*["noop"] * 4)), max_steps=6)
    assert [step.executed for step in episode.steps] == [("noop",) * 4, ("noop",) * 2]
    assert episode.steps[1].asked == ("noop",) * 4
    assert [step.done for step in episode.steps] == [False, True]
    assert not episode.steps[1].died
    assert episode.length == 6


def test_death_ends_the_episode():
    episode = one(Scripted("noop"), max_steps=400)
    assert episode.length < 400
    assert (episode.steps[-1].done, episode.steps[-1].died) == (True, True)
    assert not any(step.done or step.died for step in episode.steps[:-1])


def test_an_episode_ends_with_its_last_call_and_says_why_it_ends():
    capped = one(Says(act("noop", "noop"), NONSENSE), max_steps=10, max_calls=3)
    assert [step.ending for step in capped.steps] == ["", "", "calls"] and capped.length == 5
    assert capped.steps[-1].done and not capped.steps[-1].died
    assert [one(Says(act("noop")), max_steps=3, max_calls=calls).steps[-1].ending for calls in (3, 4)] == ["steps"] * 2
    assert one(Scripted("noop"), max_steps=400, max_calls=400).steps[-1].ending == "died"
    assert plain(store.from_bytes(store.to_bytes(capped))) == plain(capped)


def test_exploration_replaces_its_share_and_keeps_what_was_asked_for():
    episodes = play(Scripted("noop"), Spec(range(4), 100, SHOWN, explore=0.4))
    steps = [step for episode in episodes for step in episode.steps]
    assert len(steps) > 300
    assert {step.asked for step in steps} == {("noop",)}
    replaced = [step.executed[0] for step in steps if step.executed != step.asked]
    assert 0.28 < len(replaced) / len(steps) < 0.46  # 0.4 less the noops among the random ones; sd about 0.025
    assert len(set(replaced)) > 10


def test_exploration_depends_on_the_seed_alone():
    first, again, other = (one(Scripted("noop"), seed, 50, explore=0.5) for seed in (3, 3, 4))
    executed = [[step.executed for step in episode.steps] for episode in (first, again, other)]
    assert executed[0] == executed[1] != executed[2]
    walking = one(Says(act("move_up")), 3, 50, explore=0.5)
    where = [[step.executed != step.asked for step in episode.steps] for episode in (first, walking)]
    assert np.mean(np.equal(*where)) > 0.8  # apart from where the random action is the one asked for


def test_without_exploration_what_was_asked_for_is_executed():
    assert all(step.executed == step.asked for step in one(Scripted("random"), max_steps=40).steps)


def test_history_is_what_was_executed():
    policy = Says(act("move_left", "do"), NONSENSE)
    episode = one(policy, max_steps=60, explore=0.3)
    done = []
    for step, turn in zip(episode.steps, policy.turns, strict=True):
        assert step.history == turn.history == tuple(done[-HISTORY:])
        done += step.executed
    assert len(done) > HISTORY


def test_a_player_sees_the_prompt_that_it_is_asked_with():
    policy = Says(act("move_left"))
    episode = one(policy, max_steps=3, settings=Prompt(mode="text", history=1))
    assert "last move_left" in policy.turns[1].messages[1]["content"][0]["text"]
    assert Prompt.model_validate_json(episode.prompt) == Prompt(mode="text", history=1)


def test_a_player_is_ended_once_also_when_it_fails():
    policy = Says(act("noop"))
    one(policy, max_steps=3)
    assert policy.ended == 1
    policy = Says(act("noop"), RuntimeError("out of credit"))
    with pytest.raises(RuntimeError, match="out of credit"):
        one(policy, max_steps=3)
    assert policy.ended == 1


@pytest.mark.parametrize(
    "error", [WorkError("vLLM does not answer"), MemoryError("can't allocate memory"), OSError(28)]
)
def test_an_error_in_play_reaches_the_caller_as_it_was_raised_with_its_cause(error):
    error.__cause__ = ValueError("why")
    with pytest.raises(type(error)) as raised:
        play(Says(act("noop"), error), Spec(range(5), 3, SHOWN))
    assert raised.value is error and isinstance(error.__cause__, ValueError)


def test_episodes_come_in_the_order_of_the_seeds_and_are_as_if_played_alone():
    together = play(Scripted("random"), Spec([5, 2, 5], 20, SHOWN, agent="r"))
    assert [episode.seed for episode in together] == [5, 2, 5]
    alone = [one(Scripted("random"), seed, 20, agent="r") for seed in (5, 2, 5)]
    assert list(map(plain, together)) == list(map(plain, alone))


def test_an_episode_survives_as_bytes_exactly():
    for episode in varied():
        assert plain(store.from_bytes(store.to_bytes(episode))) == plain(episode)


def test_episodes_survive_in_a_file_exactly(tmp_path):
    path = tmp_path / "new" / "episodes.parquet"
    rows = store.write(path, iter(varied()))
    assert rows == sum(len(episode.steps) for episode in varied()) == pq.ParquetFile(path).metadata.num_rows
    assert list(map(plain, store.read(path))) == list(map(plain, varied()))
    assert [file.name for file in path.parent.iterdir()] == ["episodes.parquet"]


def test_the_png_of_an_observation_from_a_file_is_its_picture():
    for step in store.from_bytes(store.to_bytes(varied()[0])).steps:
        np.testing.assert_array_equal(png.decode(step.observation.png), step.observation.image)


def test_the_same_episodes_give_the_same_file(tmp_path):
    again = [store.from_bytes(store.to_bytes(episode)) for episode in varied()]
    for name, episodes in (("one", varied()), ("again", again), ("turned", again[::-1])):
        store.write(tmp_path / name, episodes)
    store.join(tmp_path / "joined", map(store.to_bytes, varied()))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "joined").read_bytes()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "turned").read_bytes()


def test_a_file_of_episodes_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "episodes.parquet"
    store.write(path, varied()[:1])
    before = path.read_bytes()

    def broken():
        yield varied()[1]
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        store.write(path, broken())
    assert path.read_bytes() == before


def test_outcomes_are_read_without_the_episodes(tmp_path):
    store.write(tmp_path / "episodes", varied())
    expected = [(episode.seed, len(episode.unlocked)) for episode in varied()]
    assert list(store.outcomes(tmp_path / "episodes")) == expected
    assert expected[0][1] > 0


def test_datasets_shows_the_pictures(tmp_path):
    import datasets

    path = tmp_path / "episodes.parquet"
    store.write(path, varied()[2:])
    table = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    assert isinstance(table.features["image"], datasets.Image)
    steps = varied()[2].steps
    assert len(table) == len(steps)
    for row, step in zip(table, steps, strict=True):
        np.testing.assert_array_equal(np.asarray(row["image"]), step.observation.image)
        assert tuple(row["executed"]) == step.executed
        assert row["vitals"] == step.observation.vitals


def test_the_first_record_of_a_key_stays():
    first, second = varied()[1:]
    with Ledger("f") as ledger:
        ledger.add("7", store.to_bytes(first))
        ledger.add("7", store.to_bytes(second))
        assert ledger.keys() == {"7"}
        assert [episode.agent for episode in map(store.from_bytes, ledger.records(["7"]))] == [first.agent]


def test_a_ledger_gives_episodes_in_the_order_asked_for_and_none_it_lacks():
    with Ledger("f") as ledger:
        for key, episode in zip("abc", varied(), strict=True):
            ledger.add(key, store.to_bytes(episode))
    with Ledger("f") as ledger:
        expected = [varied()[index].id for index in (2, 0, 1, 0)]
        assert [episode.id for episode in map(store.from_bytes, ledger.records("caba"))] == expected
        with pytest.raises(KeyError, match="d"):
            list(ledger.records("ad"))
    with Ledger("other") as ledger:
        assert ledger.keys() == set()


WRITER = """
import sys
from apprentice.ledger import Ledger

print("ready", flush=True)
sys.stdin.readline()  # both begin at once
with Ledger("shared") as ledger:
    for record in range(300):
        ledger.add(f"{sys.argv[1]}{record}", sys.argv[1].encode())
        ledger.add(f"both{record}", sys.argv[1].encode())
"""


def test_two_processes_that_write_one_ledger_lose_nothing():
    command = [sys.executable, "-c", WRITER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, name], **pipes) for name in "ab"]
    try:
        assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
        for writer in writers:
            writer.stdin.write("\n")
            writer.stdin.flush()
        for writer in writers:
            _, errors = writer.communicate(timeout=60)
            assert writer.returncode == 0, errors
    finally:
        for writer in writers:
            writer.kill()
    with Ledger("shared") as ledger:
        assert ledger.keys() == {f"{who}{record}" for who in ("a", "b", "both") for record in range(300)}


def test_a_ledger_that_another_process_is_just_making_is_waited_for():
    (cache_folder() / "episodes").mkdir(parents=True)
    other = sqlite3.connect(cache_folder() / "episodes" / "new.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    made = threading.Timer(0.5, other.execute, ["COMMIT"])
    made.start()
    try:
        with Ledger("new") as ledger:
            assert ledger.keys() == set()
    finally:
        made.join()
        other.close()


def test_a_fingerprint_changes_with_any_setting_and_not_with_their_order(monkeypatch):
    settings = {"agent": "x", "teacher": {"max_steps": 5, "prompt": {"mode": "text", "scale": 1}}, "inputs": ["a", "b"]}
    name = fingerprint(**settings)
    turned = {"inputs": ["a", "b"], "teacher": {"prompt": {"scale": 1, "mode": "text"}, "max_steps": 5}, "agent": "x"}
    assert fingerprint(**turned) == name
    changed = json.dumps(settings)
    for old, new in (('"x"', '"y"'), ("5", "6"), ("text", "image"), ("1", "2"), ('["a", "b"]', '["b", "a"]')):
        assert old in changed
        assert fingerprint(**json.loads(changed.replace(old, new))) != name
    assert fingerprint(**settings, more=None) != name
    monkeypatch.setattr("apprentice.world.world.VERSION", world.VERSION + 1)
    assert fingerprint(**settings) != name


def test_a_digest_changes_with_a_files_name_place_or_content(tmp_path):
    def tree(**files: str) -> str:
        folder = tmp_path / f"tree{len(list(tmp_path.iterdir()))}"
        for name, content in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return digest(folder)

    base = tree(a="1", b__c="2")
    assert tree(b__c="2", a="1") == base
    others = [tree(a="1", b__c="3"), tree(a="1", b__d="2"), tree(a="1", c="2"), tree(a="1"), tree(a="12", b__c="")]
    assert len({base, *others}) == 6


def test_only_what_is_missing_is_played_and_more_seeds_only_add(tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()

    def recorded(seeds) -> list[Episode]:
        spec = Spec(seeds, 4, SHOWN, fingerprint="f", agent="c")
        return list(map(store.from_bytes, record(Counted, (str(folder),), spec)))

    three = recorded([8, 2, 5])
    assert [episode.seed for episode in three] == [8, 2, 5]
    assert begun(folder) == [2, 5, 8]
    six = recorded([9, 8, 7, 2, 1, 5])
    assert [episode.seed for episode in six] == [9, 8, 7, 2, 1, 5]
    assert begun(folder) == [1, 2, 5, 7, 8, 9]
    assert [plain(six[index]) for index in (1, 3, 5)] == list(map(plain, three))
    assert plain(six[0]) == plain(one(Counted(str(folder)), 9, 4, agent="c"))
    count = len(begun(folder))
    assert list(map(plain, recorded([5, 2]))) == [plain(three[2]), plain(three[1])]
    assert len(begun(folder)) == count
    with Ledger("f") as ledger:
        assert ledger.keys() == set("125789")


def test_episodes_played_together_are_played_again_in_other_company(tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()

    def recorded(seeds) -> list[int]:
        episodes = record(Counted, (str(folder),), Spec(seeds, 2, SHOWN, fingerprint="f", agent="c", together=2))
        return [store.from_bytes(data).seed for data in episodes]

    assert recorded([1, 2, 3]) == [1, 2, 3]
    assert recorded([1, 2, 3, 4]) == [1, 2, 3, 4]
    assert begun(folder) == [1, 2, 3, 3, 4]


def fail_at(number: int, bad: int) -> int:
    if number == bad:
        raise ValueError(f"{number} is bad")
    return number


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def end_hard() -> None:
    os._exit(3)


def test_all_results_of_the_workers_come():
    assert sorted(in_processes(fail_at, [(number, -1) for number in range(20)])) == list(range(20))
    assert list(in_processes(fail_at, [])) == []


def test_an_error_in_a_worker_is_raised_here():
    with pytest.raises(ValueError, match="7 is bad"):
        list(in_processes(fail_at, [(number, 7) for number in range(20)]))
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_an_error_here():
    with pytest.raises(RuntimeError):
        list(in_processes(end_hard, [()]))


def test_workers_end_when_their_results_are_no_longer_wanted():
    results = in_processes(nap, [(0,), (300,), (300,)])
    assert next(results) == 0
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 10
    assert not multiprocessing.active_children()


def much(size: int) -> bytes:
    return bytes(size)


def test_workers_end_while_they_send_a_result():
    results = in_processes(much, [(1,), *[(1 << 25,)] * 20])
    assert next(results)
    ending = threading.Thread(target=results.close, daemon=True)
    ending.start()
    ending.join(100)
    assert not ending.is_alive(), "it waits for what a killed worker has not sent"


ORPHANS = """
import sys, time
from pathlib import Path
from apprentice.workers import in_processes

def nap(folder, number):
    (Path(folder) / str(number)).touch()
    time.sleep(300)

if __name__ == "__main__":
    list(in_processes(nap, [(sys.argv[1], number) for number in range(2)]))
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in Linux's /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    script, napping = tmp_path / "orphans.py", tmp_path / "napping"
    script.write_text(ORPHANS)
    napping.mkdir()
    parent = subprocess.Popen([sys.executable, script, napping])
    children = []
    try:
        deadline = time.monotonic() + 60
        while not list(napping.iterdir()) and parent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(napping.iterdir()), "no worker has begun"
        children = list(map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()))
        assert children
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 10
        while any(map(alive, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [child for child in children if alive(child)]
    finally:
        parent.kill()
        parent.wait()
        for child in filter(alive, children):
            os.kill(child, signal.SIGKILL)
