"""A round of distillation trains on a teacher's labels of the student's own states, and pays for none twice."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHOWN
from endpoint import NOOP, Answer, Server, completion
from small import SMALL, checkout, contents, on_cores

from apprentice import params, prompt
from apprentice.endpoint.purse import Purse
from apprentice.errors import ConfigError, OutOfMoney, WorkError
from apprentice.ledger import Ledger
from apprentice.params import Endpoint, Price, Prompt, Tutor
from apprentice.pipeline import ROOT
from apprentice.play import Spec, play
from apprentice.players.expert import Expert
from apprentice.policy import Policy
from apprentice.serving.in_process import InProcess
from apprentice.training import distillation
from apprentice.world.world import World

SEEDS = (1, 2, 3, 4)
STEPS = 6
SPEC = Spec(SEEDS, STEPS, SHOWN, agent="distill", together=2, fingerprint="x")
EXPERT = Tutor(policy="expert")
WHERE = "profiles.tiny.distill.teacher.endpoint"


def practised(
    tiny,
    name: str,
    tutor: Tutor = EXPERT,
    share: float = 0.5,
    shares: tuple = ((0, 1),),
    student: type[Policy] | None = None,
) -> distillation.Labels:
    """A round, played by these ranks, as the ledger of this name then has it."""

    def policy(place: int) -> Policy:
        return student() if student else InProcess("student", *tiny, 1.0, 16, random_seed=place)

    with Ledger(name) as ledger:
        for rank, ranks in shares:
            distillation.play_share(policy, tutor, SPEC, ledger, share, [0, 11, 0], False, WHERE, rank, ranks)
        return distillation.read(ledger, SPEC)


class Left:
    """A student that always walks to the left; its last replies are remembered."""

    name = "left"

    def begin(self, seed: int):
        return self

    async def reply(self, turn):
        from apprentice.episode import Reply

        return Reply(prompt.answer(["move_left"]))

    def end(self) -> None:
        pass


def said(row: dict) -> str:
    return json.loads(row["messages"][-1]["tool_calls"][0]["function"]["arguments"])["actions"][0]


def test_rows_are_the_students_own_states_with_the_experts_answers(tiny):
    """The expert has been shown each of them in turn, so it remembers what the student has seen."""
    found = practised(tiny, "own", share=0.0, student=Left)
    expected = []
    for seed in SEEDS:
        world, expert = World(seed, max_steps=STEPS), Expert()
        observation = world.reset()
        for step in range(STEPS):
            shown = prompt.messages(observation, SHOWN, ("move_left",) * step)
            expected.append((prompt.plain(shown), expert.act(observation)))
            observation = world.step("move_left").observation
    assert [(row["messages"][:-1], said(row)) for row in found.rows] == expected
    labels = [action for _, action in expected]
    assert len(set(labels)) > 1
    assert found.counts["agreed"] == labels.count("move_left") and found.counts["readable"] == len(labels)
    assert {row["metadata"]["teacher"] for row in found.rows} == {"expert"}


def test_the_share_of_the_teachers_actions_is_carried_out(tiny):
    """With all of them, the rows are the expert's own episodes; with a half, both have been followed."""
    own = play(distillation.Scripted("expert"), SPEC)
    alone = [list(step.executed) for episode in own for step in episode.steps]
    rows = practised(tiny, "all", share=1.0, student=Left).rows
    assert [[said(row)] for row in rows] == alone
    half = practised(tiny, "half", student=Left).rows
    texts = [row["messages"][1]["content"][-1]["text"] for row in half]
    assert half != rows and any("move_left" in text for text in texts)
    assert practised(tiny, "again", student=Left).rows == half


def test_two_ranks_play_and_label_what_one_does(tiny):
    one, two = practised(tiny, "one"), practised(tiny, "two", shares=((1, 2), (0, 2)))
    assert one == two and one.counts["decisions"] > len(SEEDS)


def test_a_student_apart_is_labelled_alike(tiny):
    """As on a server: each episode is independent of the others."""
    one, two = practised(tiny, "one", student=Left), practised(tiny, "two", student=Left, shares=((1, 2), (0, 2)))
    assert one == two


PRICE = Price(input=100.0, output=10_000.0)
REPLY = 100 * 0.0001 + 10 * 0.01
"""Dollars of an answer."""


def chat(server: Server, **changes) -> Tutor:
    settings = {"base_url": server.url, "model": "served", "api_key_env": None, "max_tokens": 10, "max_retries": 0}
    settings |= {"price": PRICE, "concurrency": 4}
    return Tutor(policy="chat", prompt=Prompt(mode="text"), endpoint=Endpoint(**settings | changes))


def test_a_model_is_shown_its_own_prompt_and_no_label_is_paid_for_twice(tiny):
    with Server() as server:
        first = practised(tiny, "first", chat(server), share=0.25)
        asked = [json.dumps(request.body["messages"]) for request in server.requests]
        assert len(asked) == first.counts["decisions"] == len(first.rows) and "image_url" not in asked[0]
        assert [said(row) for row in first.rows] == ["noop"] * len(asked)
        assert server.most_at_once <= 4
        # What a kill loses is played again, from the replies that are kept.
        with Ledger("first") as ledger, Ledger("killed") as killed:
            killed.add("x 0", next(ledger.records(["x 0"])))
        assert practised(tiny, "killed", chat(server), share=0.25) == first
        assert len(server.requests) == len(asked)
        with Purse(chat(server).endpoint, distillation.AGENT) as purse:
            assert purse.spent == pytest.approx(REPLY * len(asked))


def test_the_budget_stops_it_with_the_words_of_collect_and_a_higher_one_goes_on(tiny):
    with Server() as server:
        with pytest.raises(OutOfMoney, match=rf"{WHERE}.max_cost_usd: \$.* are spent.*a higher limit continues"):
            practised(tiny, "stopped", chat(server, max_cost_usd=1.5), student=Left)
        assert 0 < len(server.requests) * REPLY <= 1.5
        practised(tiny, "stopped", chat(server, max_cost_usd=50.0), student=Left)
        assert len(server.requests) == len(SEEDS) * STEPS  # each decision's label once


def test_a_wrong_key_stops_it_at_once(tiny):
    with Server([Answer({"error": {"message": "no such key"}}, 401)]) as server:
        with pytest.raises(ConfigError, match="no such key"):
            practised(tiny, "key", chat(server), student=Left)
        assert len(server.requests) <= 4


def test_a_label_that_cannot_be_played_is_dropped_and_counted(tiny):
    answers = [NOOP, Answer(completion({"role": "assistant", "content": "I would rather not."}, "stop"))]

    def by_turns(request):
        return answers[request.number % 2]

    with Server(by_turns) as server:
        found = practised(tiny, "dropped", chat(server), student=Left)
    assert len(found.rows) == len(server.requests) / 2 == found.counts["readable"]
    assert found.counts["decisions"] == len(SEEDS) * STEPS
    assert sum(number for (why, _), number in found.replies.items() if why) == len(found.rows)


def test_an_episode_without_an_answer_goes_on_unlabelled_and_too_many_are_an_error(tiny):
    refused = Answer({"error": {"message": "overloaded"}}, 500)

    def once(request):
        return refused if request.number == 7 else NOOP

    with Server(once) as server:
        found = practised(tiny, "once", chat(server, max_failure_rate=0.5), student=Left)
        assert found.counts["unanswered"] == len(SEEDS) * STEPS - len(found.rows) > 0
        assert len({row["metadata"]["seed"] for row in found.rows}) >= len(SEEDS) - 1

    def often(request):
        return refused if request.number > 3 else NOOP

    with Server(often) as server, pytest.raises(WorkError, match=r"distill: . of 4 episodes failed.*run again"):
        practised(tiny, "often", chat(server, max_failure_rate=0.25), student=Left)


def test_a_round_draws_from_sft_and_from_all_rounds_alike():
    settings = params.load(ROOT / "params.yaml").active.distill
    settings = settings.model_copy(update={"sft_share": 0.25, "steps": 50, "batch_size": 16})
    counts = (5000, 300, 100)
    fits = [np.ones(count, bool) for count in counts]
    fits[1][:50] = False
    lengths = [np.full(count, 130) for count in counts]
    drawn = distillation.draw(fits, lengths, settings, 1)
    assert len(drawn) == 800 and (drawn < 5000).sum() == 200
    own = Counter(drawn[drawn >= 5000].tolist())
    assert set(own) == {*range(5050, 5400)} and set(own.values()) == {1, 2}  # 600 of 350, none left out
    assert (distillation.draw(fits, lengths, settings, 1) == drawn).all()
    assert (distillation.draw(fits, lengths, settings, 0) != drawn).any()
    with pytest.raises(WorkError, match="no row is short enough"):
        distillation.draw([fits[0], ~fits[2] & False], lengths[::2], settings, 0)


@pytest.fixture(scope="module")
def taught(tiny_folder, tmp_path_factory) -> Path:
    """models/base, models/sft and data/sft/train.jsonl of an untrained student."""
    from peft import LoraConfig, get_peft_model

    from apprentice.data import chat_rows, dataset
    from apprentice.student import loading

    top = tmp_path_factory.mktemp("taught")
    shutil.copytree(tiny_folder, top / "models/base")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", exclude_modules=".*visual.*")
    get_peft_model(loading.load(top / "models/base")[0], lora).save_pretrained(top / "models/sft")
    episodes = play(distillation.Scripted("expert"), Spec((0, 1), 20, SHOWN))
    rows = (chat_rows.row(episode, step, SHOWN) for episode in episodes for step in episode.steps)
    dataset.write_jsonl(top / "data/sft/train.jsonl", rows)
    return top


TRAINED = SMALL | {"profiles.tiny.prompt": {"mode": "image", "rules": False, "history": 2}}
WEIGHTS = "models/distill/adapter_model.safetensors"


def distilled(top: Path, taught: Path, cores: int, changes: dict) -> Path:
    """Run the stage, there."""
    checkout(top, TRAINED | changes)
    for folder in ("models", "data"):
        shutil.copytree(taught / folder, top / folder)
    done = on_cores(top, cores, "stages/distill.py")
    assert done.returncode == 0, done.stderr[-3000:]
    return top


def test_no_rounds_are_a_copy_of_sft(taught, tmp_path):
    top = distilled(tmp_path / "none", taught, 1, {"profiles.tiny.distill.rounds": 0})
    assert contents(top / "models/distill") == contents(top / "models/sft")
    assert json.loads((top / "metrics/distill.json").read_text())["rounds"] == []
    assert not (top / "cache").exists()
