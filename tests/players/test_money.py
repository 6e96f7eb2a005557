"""No endpoint is paid more than max_cost_usd allows, whoever asks it; what isn't known counts as the most it can be.

The endpoint is a real HTTP server (endpoint.py), which bills what its answers say.
"""

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from endpoint import NOOP, Answer, Server, call, completion
from ruamel.yaml import YAML

from apprentice.data import judge
from apprentice.endpoint.purse import Purse
from apprentice.environment.messages import RolloutRequest
from apprentice.environment.rollouts import Rollouts
from apprentice.errors import ConfigError, OutOfMoney, WorkError
from apprentice.params import Agent, Endpoint, Judge, Price, Prompt
from apprentice.pipeline import ROOT
from apprentice.play import Spec, play
from apprentice.players import chat
from apprentice.players.scripted import Scripted

PRICE = Price(input=100.0, output=10_000.0)
REPLY = 100 * 0.0001 + 10 * 0.01
"""Dollars of an answer that says what it has used."""
MOST = 10 * 0.01
"""Dollars of the longest reply; the prompt costs at most 0.7 more."""


def endpoint(server: Server, **changes) -> Endpoint:
    settings = {"base_url": server.url, "model": "served", "api_key_env": None, "max_tokens": 10, "max_retries": 0}
    return Endpoint(**settings | {"price": PRICE, "max_cost_usd": 5.0, "concurrency": 4} | changes)


def spec(seeds: range = range(4), max_steps: int = 5, agent: str = "gpt") -> Spec:
    return Spec(seeds, max_steps, Prompt(mode="text"), agent)


def played(settings: Endpoint, spec: Spec) -> int:
    """How many episodes there are afterwards."""
    return len(list(chat.record(spec, settings, "code", f"teachers.{spec.agent}.endpoint")))


def spent(settings: Endpoint, agent: str = "gpt") -> float | None:
    return chat.cost(spec(agent=agent), settings)[1]


def using(usage: object, message: dict | None = None) -> Answer:
    return Answer({**completion(message or call("noop")), "usage": usage})


# What an answer says that it has used

TOKENS = {
    "floats": ({"prompt_tokens": 100.0, "completion_tokens": 10.0, "total_tokens": 110.0}, (100, 10)),
    "texts": ({"prompt_tokens": "100", "completion_tokens": " 10 ", "total_tokens": "110"}, (100, 10)),
    "completion from the total": ({"prompt_tokens": 100, "completion_tokens": None, "total_tokens": 110}, (100, 10)),
    "prompt from the total": ({"completion_tokens": 10, "total_tokens": 110}, (100, 10)),
    "reasoning in the total alone": ({"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 400}, (100, 300)),
    "reasoning beside, without a total": (
        {"prompt_tokens": 100, "completion_tokens": 10, "completion_tokens_details": {"reasoning_tokens": 290}},
        (100, 300),
    ),
    "reasoning that is counted": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 300,
            "total_tokens": 400,
            "completion_tokens_details": {"reasoning_tokens": 290},
        },
        (100, 300),
    ),
    "a total that is too small": ({"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 0}, (100, 10)),
    "more cached than there are": (
        {"prompt_tokens": 100, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 10**6}},
        (100, 10),
    ),
}


@pytest.mark.parametrize("how", TOKENS)
def test_tokens_are_read_however_they_are_written(how):
    usage, (prompt, completion) = TOKENS[how]
    with Server([using(usage)]) as server:
        settings = endpoint(server, max_cost_usd=50.0)
        played(settings, spec(range(1), 2))
        assert spent(settings) == pytest.approx(2 * (prompt * 0.0001 + completion * 0.01))


UNKNOWN = {
    "none": None,
    "nothing in it": {},
    "nulls": {"prompt_tokens": None, "completion_tokens": None, "total_tokens": 0},
    "only a total": {"total_tokens": 110},
    "only the prompt": {"prompt_tokens": 100},
    "no reply, though there is one": {"prompt_tokens": 100, "completion_tokens": 0, "total_tokens": 100},
    "zeros": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    "below zero": {"prompt_tokens": -100, "completion_tokens": -10},
    "too many": {"prompt_tokens": 2**40, "completion_tokens": 2**40},
    "no numbers": {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
    "truths": {"prompt_tokens": True, "completion_tokens": True},
    "words": {"prompt_tokens": "many", "completion_tokens": "few"},
    "a list": [100, 10],
    "a cost of nothing": {"cost": 0},
}


@pytest.mark.parametrize("how", UNKNOWN)
def test_what_is_not_known_costs_the_most_it_can_and_the_limit_holds(how):
    with Server([using(UNKNOWN[how])]) as server:
        with pytest.raises(WorkError, match=r"max_cost_usd: .*what is not known counts as the most it can be"):
            played(endpoint(server, max_cost_usd=2.0), spec(range(1), 40))
        assert 2 <= len(server.requests) <= 2.0 / MOST
        assert MOST < spent(endpoint(server, max_cost_usd=2.0)) <= 2.0


@pytest.mark.parametrize("how", UNKNOWN)
def test_without_a_limit_what_is_not_known_is_not_nothing(how):
    with Server([using(UNKNOWN[how])]) as server:
        settings = endpoint(server, max_cost_usd=None)
        played(settings, spec(range(1), 2))
        assert chat.cost(spec(range(1), 2), settings) == (None, None)
        assert "for an unknown price" in chat.status(spec(range(1), 2), settings)


@pytest.mark.parametrize(
    ("usage", "dollars"),
    [
        ({"cost": 0.25}, 0.25),
        ({"prompt_tokens": 100, "completion_tokens": 10, "cost": "0.25"}, 0.25),
        ({"cost": 0.0125, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.25}}, 0.2625),
        ({"cost": 0.25, "is_byok": False, "cost_details": {"upstream_inference_cost": 0.25}}, 0.25),
        ({"cost": {"total_cost": 0.25}}, 0.25),
        ({"cost_in_usd_ticks": 2_500_000_000}, 0.25),
        ({"estimated_cost": 0.25}, 0.25),
        ({"prompt_tokens": 100, "completion_tokens": 10, "cost": 0.0}, REPLY),
        ({"prompt_tokens": 100, "completion_tokens": 10, "cost": -1}, REPLY),
    ],
)
def test_what_the_provider_says_that_it_charges_is_what_it_costs(usage, dollars):
    with Server([using(usage)]) as server:
        settings = endpoint(server, max_cost_usd=50.0)
        played(settings, spec(range(1), 2))
        assert spent(settings) == pytest.approx(2 * dollars)


def test_a_reply_without_a_price_is_counted_when_there_is_one():
    with Server() as server:
        played(endpoint(server, price=None, max_cost_usd=None), spec(range(2), 5))
        assert spent(endpoint(server, price=None, max_cost_usd=None)) is None
        limited = endpoint(server, max_cost_usd=2.0)
        with pytest.raises(OutOfMoney):
            played(limited, spec(range(20), 5))
        assert len(server.requests) * REPLY <= 2.0
        assert spent(limited) == pytest.approx(len(server.requests) * REPLY)


# What comes to no reply is paid all the same


@pytest.mark.parametrize(
    "answer",
    [
        Answer({**NOOP.body, "choices": []}),
        Answer({**NOOP.body, "choices": None}),
        Answer({name: value for name, value in NOOP.body.items() if name != "choices"}),
        Answer({**NOOP.body, "error": {"message": "upstream"}}),
        Answer(completion({"role": "assistant", "content": "I mo"}, "error")),
        Answer({"error": {"message": "upstream is busy"}}),
        Answer("<html>"),
        Answer("[]"),
    ],
)
def test_answers_that_come_to_nothing_are_counted_over_all_runs(answer, monkeypatch):
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, sleep=asyncio.sleep: sleep(0))
    with Server([answer]) as server:
        settings = endpoint(server, max_cost_usd=2.0)
        for run in range(10):
            try:
                played(settings, spec(range(10 * run, 10 * run + 10), 1))
            except WorkError as error:
                said = str(error)
        assert "max_cost_usd" in said
        assert MOST < len(server.requests) * REPLY <= 2.0


@pytest.mark.parametrize(
    "answer",
    [
        Answer({"error": {"message": "No.", "code": "content_filter"}}, 400),
        Answer(NOOP.body, delay=5),
        Answer(NOOP.body, cut=40),
        Answer(cut=0),
        Answer("Gateway time-out", 504),
    ],
)
def test_a_request_that_is_lost_or_filtered_counts_in_full(answer):
    with Server([answer]) as server:
        settings = endpoint(server, max_cost_usd=1.5, timeout=0.3, max_failure_rate=1.0)
        with pytest.raises(WorkError):
            played(settings, spec(range(30), 1))
        assert len(server.requests) < 15
        assert len(server.requests) * MOST < spent(settings) <= 1.5


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_a_request_that_is_refused_costs_nothing(status):
    with Server([Answer("no", status), NOOP]) as server:
        settings = endpoint(server, max_retries=1)
        with suppress(WorkError):
            played(settings, spec(range(1), 1))
        assert spent(settings) == pytest.approx((len(server.requests) - 1) * REPLY)


def test_nothing_is_sent_to_a_server_that_is_not_there_and_nothing_paid():
    with Server() as server:
        settings = endpoint(server)
    with pytest.raises(WorkError, match="no answer"):
        played(settings, spec())
    assert spent(settings) == 0.0


def _played(environment: dict[str, str], settings: Endpoint, spec: Spec) -> None:
    os.environ.update(environment)
    try:
        played(settings, spec)
    except WorkError as error:
        sys.exit(str(error))


def in_a_process(*arguments) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["apprentice.players.chat", "apprentice.play", "openai"])
    process = context.Process(target=_played, args=({"APPRENTICE_CACHE": os.environ["APPRENTICE_CACHE"]}, *arguments))
    process.start()
    return process


def test_what_a_killed_process_had_under_way_counts_in_full():
    def answer(request) -> Answer:
        return Answer(NOOP.body, delay=0.0 if request.number < 8 else 60.0)

    with Server(answer) as server:
        settings = endpoint(server, max_cost_usd=10.0)
        process = in_a_process(settings, spec(range(4), 50))
        while len(server.requests) < 12:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        paid, lost = 8 * REPLY, spent(settings) - 8 * REPLY
        assert 4 * MOST < lost < 4 * 0.8
        server.answer = lambda request: NOOP
        with pytest.raises(OutOfMoney):
            played(settings, spec(range(20), 50))
        assert paid + lost < spent(settings) <= 10.0


# One purse for all


def test_several_processes_and_agents_have_one_purse():
    with Server(lambda request: Answer(NOOP.body, delay=0.01)) as server:
        settings = endpoint(server, max_cost_usd=10.0)
        names = ("one", "two", "three")
        processes = [in_a_process(settings, spec(range(30), 50, name)) for name in names]
        for process in processes:
            process.join(120)
            assert process.exitcode == 1
        assert 10.0 - 0.8 - REPLY < len(server.requests) * REPLY <= 10.0
        assert sum(spent(settings, name) for name in names) == pytest.approx(len(server.requests) * REPLY)


def test_the_servers_rollouts_pay_from_the_same_purse():
    with Server() as server:
        settings = endpoint(server, max_cost_usd=3.0)
        agent = Agent(policy="chat", prompt=Prompt(mode="text"), endpoint=settings)
        rollouts = Rollouts((), {"gpt": (agent, "teachers.gpt.endpoint")}, {}, 2)
        try:
            rollouts.start(RolloutRequest(policy="gpt", seed=1, max_steps=10)).result(60)
            with pytest.raises(OutOfMoney):
                played(settings, spec(range(20), 5))
            with pytest.raises(OutOfMoney):
                rollouts.start(RolloutRequest(policy="gpt", seed=2, max_steps=40)).result(60)
        finally:
            rollouts.close()
        assert len(server.requests) * REPLY <= 3.0
        assert spent(settings) == pytest.approx(len(server.requests) * REPLY)


def test_a_rollout_ends_with_its_agents_last_call():
    with Server() as server:
        agent = Agent(policy="chat", prompt=Prompt(mode="text"), endpoint=endpoint(server), max_calls=2)
        rollouts = Rollouts((), {"gpt": (agent, "teachers.gpt.endpoint")}, {}, 2)
        try:
            found = rollouts.start(RolloutRequest(policy="gpt", seed=1, max_steps=10)).result(60)
        finally:
            rollouts.close()
        assert (found["steps"], found["ending"], len(server.requests)) == (2, "calls", 2)


def test_a_rollout_that_is_ended_has_paid_for_what_it_asked():
    with Server(lambda request: Answer(NOOP.body, delay=30)) as server:
        settings = endpoint(server)
        agent = Agent(policy="chat", prompt=Prompt(mode="text"), endpoint=settings)
        rollouts = Rollouts((), {"gpt": (agent, "teachers.gpt.endpoint")}, {}, 2)
        rollouts.start(RolloutRequest(policy="gpt", seed=1, max_steps=10))
        while not server.requests:
            time.sleep(0.01)
        rollouts.close()
        assert MOST < spent(settings) < 0.8


def test_a_judges_answers_without_marks_are_paid_kept_and_counted():
    episodes = play(Scripted("random"), Spec(range(12), 5, Prompt()))
    words = Answer(completion({"role": "assistant", "content": "A fine game."}, "stop"))
    with Server([words]) as server:
        settings = Judge(endpoint=endpoint(server, max_cost_usd=1.0, price=Price(input=50.0, output=1000.0)))
        for _ in range(3):
            verdicts = judge.scores(episodes, settings)
            assert all(verdict.score is None and verdict.why_not for verdict in verdicts)
        bill = len(server.requests) * (100 * 0.00005 + 10 * 0.001)
        assert judge.spent(settings) == pytest.approx(bill) and bill <= 1.0
        assert len(server.requests) <= len(episodes)


def test_the_stages_say_what_was_paid(tmp_path):
    """An agent of the benchmark and a teacher with the same endpoint have one purse, too."""
    tree = YAML(typ="safe").load(ROOT / "params.yaml")
    with Server() as server:
        asked = json.loads(endpoint(server, max_cost_usd=2.0).model_dump_json(exclude_unset=True))
        agent = {"policy": "chat", "prompt": {"mode": "text"}, "endpoint": asked}
        tree["teachers"] = {"gpt": agent | {"seeds": "0-1", "max_steps": 5}}
        tree["benchmark"] |= {"seeds": "200000-200009", "max_steps": 5, "agents": {"paid": agent}}
        YAML(typ="safe").dump(tree, tmp_path / "params.yaml")

        def stage(*command: str) -> subprocess.CompletedProcess:
            program = [sys.executable, ROOT / "stages" / f"{command[0]}.py", *command[1:]]
            return subprocess.run(program, cwd=tmp_path, env=os.environ, capture_output=True, text=True)

        done = stage("collect", "gpt")
        assert done.returncode == 0, done.stderr
        paid = json.loads((tmp_path / "metrics/cost/gpt.json").read_text())
        assert paid["spent_usd"] == pytest.approx(10 * REPLY)
        done = stage("benchmark", "paid")
        assert done.returncode == 1 and "benchmark.agents.paid.endpoint.max_cost_usd" in done.stderr
        assert 2.0 - 0.8 - REPLY < len(server.requests) * REPLY <= 2.0


# The most is learned


def test_usage_above_the_assumed_most_is_learned_by_one_request():
    dear = using({"prompt_tokens": 10_000, "completion_tokens": 90, "total_tokens": 10_090})
    each = 10_000 * 0.0001 + 90 * 0.01
    with Server(lambda request: Answer(dear.body, delay=0.02)) as server:
        for limit in (1.0, 9.0):
            with pytest.raises(OutOfMoney):
                played(endpoint(server, max_cost_usd=limit, concurrency=32), spec(range(64), 5))
            assert len(server.requests) * each <= limit + each - 0.3
        assert len(server.requests) == 4


def test_a_later_surprise_meets_few_that_are_under_way():
    dear = using({"prompt_tokens": 100, "completion_tokens": 200, "total_tokens": 300})

    def answer(request) -> Answer:
        return Answer((NOOP if request.number < 1 else dear).body, delay=0.02)

    with Server(answer) as server:
        with pytest.raises(OutOfMoney):
            played(endpoint(server, max_cost_usd=2.0, concurrency=32), spec(range(64), 5))
        assert len(server.requests) <= 3


def test_what_was_learned_is_known_to_the_next_run_and_to_others():
    dear = using({"prompt_tokens": 100, "completion_tokens": 200, "total_tokens": 300})
    with Server([dear]) as server:
        settings = endpoint(server, max_cost_usd=2.3)
        for name in ("one", "two"):
            with pytest.raises(OutOfMoney):
                played(settings, spec(range(8), 5, name))
        assert len(server.requests) == 1


# An error drops nothing


@pytest.mark.parametrize(("status", "error"), [(401, ConfigError), (402, OutOfMoney), (400, ConfigError)])
def test_what_others_have_under_way_is_kept_when_one_is_refused(status, error):
    refused = Answer({"error": {"message": "temperature is not supported"}}, status)

    def answer(request) -> Answer:
        return refused if request.number == 3 else Answer(NOOP.body, delay=0.3)

    with Server(answer) as server:
        settings = endpoint(server, max_cost_usd=None, temperature=0.5)
        with pytest.raises(error):
            played(settings, spec(range(4), 2))
        assert len(server.requests) == 4
        assert "3 unfinished, with 3 decisions" in chat.status(spec(range(4), 2), settings)
        server.answer = lambda request: NOOP
        assert played(settings, spec(range(4), 2)) == 4
        assert len(server.requests) == 4 + 8 - 3


def test_a_judge_keeps_what_is_under_way_when_one_is_refused():
    episodes = play(Scripted("random"), Spec(range(4), 5, Prompt()))
    arguments = json.dumps({"outcome": 5})
    marks = completion(call(name="score", arguments=arguments))

    def answer(request) -> Answer:
        return Answer({"error": {"message": "Who?"}}, 401) if request.number == 3 else Answer(marks, delay=0.3)

    with Server(answer) as server:
        settings = Judge(endpoint=endpoint(server))
        with pytest.raises(ConfigError, match=r"judge\.endpoint"):
            judge.scores(episodes, settings)
        server.answer = lambda request: Answer(marks)
        assert [verdict.score for verdict in judge.scores(episodes, settings)] == [0.5] * 4
        assert len(server.requests) == 5


def test_a_request_that_waits_for_its_retry_is_not_sent_when_another_is_refused():
    def answer(request) -> Answer:
        busy = Answer("busy", 503)
        return busy if request.number == 0 else Answer({"error": {"message": "Pay.", "code": 402}}, 402, delay=0.1)

    with Server(answer) as server:
        with pytest.raises(OutOfMoney, match="no credit"):
            played(endpoint(server, max_cost_usd=None, max_retries=9, concurrency=2), spec(range(9), 1))
        assert len(server.requests) == 2


def _opened(folder: str, start) -> None:
    os.environ["APPRENTICE_CACHE"] = folder
    start.wait()
    with Purse(Endpoint(model="m", api_key_env=None), "gpt"):
        pass


def test_many_processes_may_be_the_first_to_open_a_purse(tmp_path):
    context = multiprocessing.get_context("fork")
    for number in range(5):
        start = context.Barrier(6)
        processes = [context.Process(target=_opened, args=(str(tmp_path / str(number)), start)) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0


def test_a_purse_is_opened_by_many_at_once_and_counts_each_once():
    settings = Endpoint(model="m", api_key_env=None)

    async def pay(agent: str) -> None:
        with Purse(settings, agent) as purse:
            for _ in range(20):
                async with purse.opened(100, 10) as payment:
                    await asyncio.sleep(0)
                    payment.dollars, payment.answered = 0.5, True

    async def all_of_them() -> None:
        await asyncio.gather(*(pay(f"agent{number % 3}") for number in range(6)))

    asyncio.run(all_of_them())
    with Purse(settings, "agent0") as purse:
        assert purse.spent == purse.known == pytest.approx(20.0)
