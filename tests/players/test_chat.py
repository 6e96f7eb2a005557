"""A paid teacher: whatever its endpoint does, the run goes on or says why not, and nothing is paid for twice.

The endpoint is a real HTTP server (endpoint.py), the client the real one.
"""

import asyncio
import gzip
import json
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from endpoint import NOOP, Answer, Server, call, completion, playing
from ruamel.yaml import YAML

from apprentice import prompt, store
from apprentice.cache import cache_folder
from apprentice.endpoint import prices
from apprentice.endpoint.client import Client, Completion, pause_before
from apprentice.episode import Episode
from apprentice.errors import ConfigError, NoAnswer, WorkError
from apprentice.params import Endpoint, Price, Prompt, Teacher
from apprentice.pipeline import ROOT
from apprentice.play import Spec
from apprentice.players import chat

KEY = "sk-do-not-tell-0123456789"
ASKED = [{"role": "user", "content": "Which way?"}]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def endpoint(server: Server, **changes) -> Endpoint:
    return Endpoint(
        **{"base_url": server.url, "model": "served", "api_key_env": "TEST_KEY", "concurrency": 2} | changes
    )


def teacher(server: Server, seeds="0-3", max_steps: int = 5, mode: str = "text", **changes) -> Teacher:
    return Teacher(
        policy="chat", seeds=seeds, max_steps=max_steps, prompt=Prompt(mode=mode), endpoint=endpoint(server, **changes)
    )


def completed(server: Server, tools=prompt.TOOLS, **changes) -> Completion:
    async def ask() -> Completion:
        async with Client(endpoint(server, **changes), "teachers.x.endpoint") as client:
            return await client.complete(ASKED, tools)

    return asyncio.run(ask())


def spec(teacher: Teacher) -> Spec:
    return Spec(teacher.seeds, teacher.max_steps, teacher.prompt, "gpt", teacher.explore)


def records(teacher: Teacher, code: str) -> Iterator[bytes]:
    return chat.record(spec(teacher), teacher.endpoint, code, "teachers.gpt.endpoint")


def recorded(teacher: Teacher, code: str = "code") -> list[Episode]:
    return list(map(store.from_bytes, records(teacher, code)))


def status_of(teacher: Teacher) -> str:
    return chat.status(spec(teacher), teacher.endpoint)


def cost_of(teacher: Teacher) -> tuple[float | None, float | None]:
    return chat.cost(spec(teacher), teacher.endpoint)


def decisions(episodes: list[Episode]) -> int:
    return sum(len(episode.steps) for episode in episodes)


def same(one: list[Episode], other: list[Episode]) -> bool:
    return [store.to_bytes(episode) for episode in one] == [store.to_bytes(episode) for episode in other]


# What is asked


def test_a_setting_that_is_absent_is_not_sent():
    with Server() as server:
        completed(server)
        assert server.requests[0].body == {"model": "served", "messages": ASKED, "tools": prompt.TOOLS}
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_every_setting_is_sent_as_it_stands():
    changes = {
        "temperature": 0.0,
        "top_p": 0.9,
        "max_tokens": 7,
        "max_tokens_field": "max_tokens",
        "tool_choice": "required",
        "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
    }
    with Server() as server:
        completed(server, **changes)
        completed(server, max_tokens=7)
        completed(server, tools=None, tool_choice="required")
        first, second, third = (request.body for request in server.requests)
    sent = {"temperature": 0.0, "top_p": 0.9, "max_tokens": 7, "tool_choice": "required"}
    assert first == {"model": "served", "messages": ASKED, "tools": prompt.TOOLS, **sent, **changes["extra_body"]}
    assert second["max_completion_tokens"] == 7 and "max_tokens" not in second
    assert third == {"model": "served", "messages": ASKED}


@pytest.mark.parametrize(("mode", "kinds"), [("text", {"text"}), ("image", {"text", "image_url"})])
def test_pictures_are_sent_or_not_as_the_prompt_says(mode, kinds):
    with Server() as server:
        recorded(teacher(server, "0", 1, mode))
        assert {part["type"] for part in server.requests[0].body["messages"][1]["content"]} == kinds


def test_an_endpoint_without_a_key_needs_none():
    with Server() as server:
        assert completed(server, api_key_env=None).message == call("noop")


# Faults that pass

FAULTS = {
    "429": Answer({"error": {"message": "slow down"}}, 429),
    "429 with Retry-After": Answer("", 429, {"Retry-After": "2"}),
    "500": Answer("oh", 500),
    "503 in HTML": Answer("<html>", 503, {"Content-Type": "text/html"}),
    "time-out": Answer(NOOP.body, delay=30),
    "dropped connection": Answer(cut=0),
    "connection dropped in the body": Answer(NOOP.body, cut=40),
    "truncated JSON": Answer(json.dumps(NOOP.body)[:60]),
    "a page instead of JSON": Answer("<html>Log in</html>", 200, {"Content-Type": "text/html"}),
    "not gzip": Answer("text", 200, {"Content-Encoding": "gzip"}),
    "an error with status 200": Answer({"error": {"message": "upstream is busy"}}),
    "no choices": Answer({**NOOP.body, "choices": []}),
    "a number": Answer("5"),
    "brackets without end": Answer("[" * 200_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_only_time(fault):
    with Server([FAULTS[fault], NOOP]) as server:
        answer = completed(server, timeout=0.5)
        assert answer.message == call("noop")
        assert (answer.finish_reason, answer.model, answer.prompt_tokens) == ("tool_calls", "served", 100)
        first, second = server.requests
        assert second.began - first.began > (2 if "Retry-After" in fault else 0.3)
        assert second.body == first.body


def test_a_compressed_answer_is_read():
    body = gzip.compress(json.dumps(NOOP.body).encode())
    with Server([Answer(body, 200, {"Content-Encoding": "gzip"})]) as server:
        assert completed(server).message == call("noop")


def test_pauses_grow_and_no_two_clients_pause_alike():
    with Server([Answer("", 500)] * 6 + [NOOP] * 2) as server:

        async def ask_twice():
            async with Client(endpoint(server), "x") as client:
                await asyncio.gather(client.complete(ASKED), client.complete(ASKED))

        asyncio.run(ask_twice())
        began = [request.began for request in server.requests]
        assert len(began) == 8
        assert began[7] - began[5] > began[3] - began[1] > 0.3
        assert abs(began[7] - began[6]) > 0.001


def test_an_endpoint_that_dies_for_a_minute_is_waited_for():
    retries = Endpoint(model="m", api_key_env="TEST_KEY").max_retries
    assert sum(pause_before(retry) for retry in range(1, retries + 1)) > 60
    with Server(lambda request: playing(request.body, 0.05)) as server:
        port, was = server.port, teacher(server, max_steps=20)
        undisturbed = recorded(was)
        cache_folder().rename(cache_folder().with_name("undisturbed"))
        count = len(server.requests)
        threading.Timer(0.5, server.close).start()
        threading.Timer(3, server.listen, [port]).start()
        assert same(recorded(was), undisturbed)
        assert count <= len(server.requests) - count <= count + was.endpoint.concurrency


# Faults that are data

WRONG = {
    "no tool call": completion({"role": "assistant", "content": "I would go left."}, "stop"),
    "nothing said": completion({"role": "assistant", "content": None}, "stop"),
    "unknown tool": completion(call(name="jump")),
    "arguments that are no JSON": completion(call(arguments='{"actions": ["do"')),
    "arguments that are a number": completion(call(arguments="5")),
    "an unknown action": completion(call("fly")),
    "a tool call without end": completion({"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}),
    "a long reply": completion({"role": "assistant", "content": "left " * 40_000}, "length"),
    "long arguments": completion(call(arguments="9" * 200_000), "length"),
    "deep arguments": completion(call(arguments="[" * 200_000), "length"),
    "refusal": completion({"role": "assistant", "content": None, "refusal": "I can't help with that."}, "stop"),
    "content filter": completion({"role": "assistant", "content": None}, "content_filter"),
    "half a character": {**completion({"role": "assistant", "content": "\ud83d"}, "\ud83d"), "model": "\ud83d"},
    "parts": completion({"role": "assistant", "content": [{"type": "text", "text": "left"}]}, "stop"),
    "odd figures": {**completion({"content": None}), "usage": {"prompt_tokens": -3, "completion_tokens": 10**30}},
    "no figures": {**completion({"content": None}), "usage": None},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_model_does_wrong_costs_a_noop_is_recorded_and_the_episode_goes_on(wrong):
    with Server([Answer(completion(call("move_left"))), Answer(WRONG[wrong]), NOOP]) as server:
        settings = teacher(server, "0", 4)
        (episode,) = recorded(settings)
        assert len(server.requests) == 4
        assert [bool(step.invalid) for step in episode.steps] == [False, True, False, False]
        assert [step.executed for step in episode.steps] == [("move_left",)] + [("noop",)] * 3
        store.write(cache_folder() / "trace.parquet", [episode])
        assert same(recorded(settings, "other code"), [episode])  # from the kept replies
        assert len(server.requests) == 4
    if wrong in ("refusal", "content filter"):
        assert episode.steps[1].reply.finish_reason == wrong.replace(" ", "_")


def test_an_endpoint_that_answers_nothing_is_asked_a_few_times_and_then_it_is_a_reply():
    with Server([Answer({**NOOP.body, "choices": []})]) as server:
        (episode,) = recorded(teacher(server, "0", 1))
        assert len(server.requests) == 4
        assert (episode.steps[0].invalid, episode.steps[0].reply.finish_reason) == ("no tool call", "empty")


def test_a_prompt_that_the_filter_refuses_is_a_reply():
    refused = Answer({"error": {"message": "No.", "code": "content_filter"}}, 400)
    with Server([refused, NOOP]) as server:
        (episode,) = recorded(teacher(server, "0", 2))
        assert [step.reply.finish_reason for step in episode.steps] == ["content_filter", "tool_calls"]


# Faults that stay


@pytest.mark.parametrize(("status", "said"), [(401, "TEST_KEY"), (403, "TEST_KEY"), (404, "the model served")])
def test_a_wrong_key_or_model_ends_the_run_before_an_episode_is_played(status, said):
    with Server([Answer({"error": {"message": f"Not {KEY}!"}}, status)]) as server:
        settings = teacher(server, "0-99")
        with pytest.raises(ConfigError) as raised:
            recorded(settings)
        assert len(server.requests) <= settings.endpoint.concurrency
    for part in (said, "teachers.gpt.endpoint", server.url, f"HTTP {status}", "Not ***!"):
        assert part in str(raised.value)
    assert "0 of 100 episodes done; 0 unfinished, with 0 decisions" in status_of(settings)


def test_an_account_without_credit_ends_the_run():
    broke = Answer({"error": {"message": "Pay.", "code": "insufficient_quota"}}, 429)
    with Server([NOOP, broke]) as server, pytest.raises(WorkError, match=r"no credit left: Pay\."):
        recorded(teacher(server, max_retries=0))


def test_one_broken_episode_is_a_failure_and_the_next_run_tries_it_again(capsys):
    with Server([NOOP] * 7 + [Answer("broken", 500)] + [NOOP]) as server:
        settings = teacher(server, "4,9,2,7", 5, concurrency=1, max_retries=0, max_failure_rate=0.25)
        assert [episode.seed for episode in recorded(settings)] == [4, 2, 7]
        assert "1 × HTTP 500: broken (seed 9)" in capsys.readouterr().err
        said = status_of(settings)
        assert "3 of 4 episodes done; 1 unfinished, with 2 decisions; 1 failed" in said
        assert "HTTP 500: broken (seed 9)" in said
        count = len(server.requests)
        assert [episode.seed for episode in recorded(settings)] == [4, 9, 2, 7]
        assert len(server.requests) - count == 3  # what was answered before the fault is kept
        assert "4 of 4 episodes done; 0 unfinished, with 0 decisions; 0 failed" in status_of(settings)


def test_more_failures_than_allowed_end_the_run_with_the_reason():
    with Server([NOOP] * 5 + [Answer("out of order", 500)]) as server:
        settings = teacher(server, "0-99", 5, max_retries=0, concurrency=1, max_failure_rate=0.1)
        with pytest.raises(WorkError) as raised:
            recorded(settings)
        assert len(server.requests) == 5 + 11
        for part in (
            "11 of 100 episodes failed",
            "max_failure_rate is 0.1",
            "11 × HTTP 500: out of order",
            "run again",
        ):
            assert part in str(raised.value)


def test_of_few_episodes_one_may_be_too_many_but_the_others_are_played_first():
    with Server([Answer("broken", 500), NOOP]) as server:
        settings = teacher(server, "0-3", max_retries=0, concurrency=1, max_failure_rate=0.1)
        with pytest.raises(WorkError, match=r"1 of 4 episodes failed, and max_failure_rate is 0\.1"):
            recorded(settings)
        assert "3 of 4 episodes done" in status_of(settings)


def test_a_connection_refused_says_so():
    with Server() as server:
        settings = teacher(server, max_retries=0)
    with pytest.raises(WorkError, match=r"of 4 episodes failed.*no answer: All connection attempts failed"):
        recorded(settings)


# Many at once


def test_so_many_episodes_are_under_way_as_concurrency_says_and_none_waits_for_another():
    slow = threading.Event()

    def answer(request) -> Answer:
        first = request.body["messages"] == first_shown
        if first and not slow.is_set():
            slow.set()
            return Answer(NOOP.body, delay=8)
        return Answer(NOOP.body, delay=0.02)

    with Server() as server:
        recorded(teacher(server, "0", 1))
        first_shown = server.requests[0].body["messages"]
    with Server(answer) as server:
        settings = teacher(server, "0-7", 10, concurrency=4)
        episodes = recorded(settings)
        assert [episode.seed for episode in episodes] == list(range(8))
        waiting = next(request for request in server.requests if request.body["messages"] == first_shown)
        meanwhile = [request for request in server.requests if waiting.began < request.ended < waiting.ended]
        assert len(meanwhile) == 7 * 10
        assert server.most_at_once == 4


def test_what_is_played_depends_on_nothing_but_the_settings():
    with Server(lambda request: playing(request.body, random.uniform(0, 0.01))) as server:
        alone = recorded(teacher(server, "0-4", 20, "image", concurrency=1))
        cache_folder().rename(cache_folder().with_name("alone"))
        assert same(recorded(teacher(server, "0-4", 20, "image", concurrency=5, timeout=9)), alone)


# Money


def test_the_price_of_a_model_is_known_also_with_a_date():
    price = prices.price(Endpoint(model="gpt-4o-mini-2024-07-18", api_key_env=None))
    assert price == Price(input=0.15, cached_input=0.075, output=0.6)
    assert prices.price(Endpoint(model="gpt-4o-mini-tuned", api_key_env=None)) is None
    own = Price(input=1, output=2)
    assert prices.price(Endpoint(model="gpt-4o-mini", api_key_env=None, price=own)) is own
    assert prices.table()["date"]


def test_dollars():
    price = Price(input=1.0, cached_input=0.5, output=4.0)
    assert prices.dollars(price, 1_000_000, 500_000) == 3.0
    assert prices.dollars(price, 1_000_000, 0, 400_000) == 0.8
    assert prices.dollars(Price(input=1.0, output=4.0), 1_000_000, 0, 400_000) == 1.0


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        ("gpt-4o", (1024, 1024), 765),  # the example of OpenAI's documentation
        ("gpt-4o-mini", (288, 288), 8500),
        ("gpt-4.1-mini", (288, 288), 132),
        ("Qwen/Qwen3-VL-8B-Instruct", (1152, 1152), 1764),
    ],
)
def test_picture_tokens(model, size, tokens):
    assert prices.picture_tokens(model, *size) == tokens


PRICE = Price(input=100.0, output=10_000.0)
DECISION = 100 * 0.0001 + 10 * 0.01


def test_what_a_reply_costs_is_summed_and_kept():
    with Server([FAULTS["no choices"], NOOP]) as server:
        settings = teacher(server, "0-1", 4, price=PRICE)
        assert decisions(recorded(settings)) == 8
        assert cost_of(settings) == (pytest.approx(9 * DECISION), pytest.approx(9 * DECISION))
        assert "8 replies for $0.9900" in status_of(settings)
        free = settings.model_copy(update={"endpoint": endpoint(server, price=Price(input=0, output=0))})
        assert cost_of(free) == cost_of(settings)  # what was paid was paid


def test_a_reply_without_figures_costs_what_it_may_cost_at_most():
    silent = {name: value for name, value in NOOP.body.items() if name != "usage"}
    with Server([Answer(silent)]) as server:
        answer = completed(server, tools=None, price=PRICE, max_tokens=50, max_cost_usd=100)
    assert 50 * 0.01 < answer.cost < 50 * 0.01 + 0.0001 * 600


def test_without_a_price_the_cost_is_unknown_and_a_limit_is_an_error():
    with Server() as server:
        settings = teacher(server)
        recorded(settings)
        assert cost_of(settings) == (None, None)
        with pytest.raises(
            ConfigError, match=r"price of served is not known; give it as teachers\.gpt\.endpoint\.price"
        ):
            recorded(teacher(server, max_tokens=9, max_cost_usd=1.0))


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_limit_stops_before_it_is_passed_and_a_higher_one_goes_on(concurrency):
    def settings(limit: float) -> Teacher:
        changes = {"price": PRICE, "max_tokens": 10, "max_cost_usd": limit, "concurrency": concurrency}
        return teacher(server, "0-7", 10, **changes)

    with Server(lambda request: playing(request.body, 0.01)) as server:
        for limit in (3.0, 6.0):
            with pytest.raises(
                WorkError, match=rf"max_cost_usd: \$.* of \${limit:g} are spent.*a higher limit continues"
            ):
                recorded(settings(limit))
            spent = len(server.requests) * DECISION
            worst = 6000 * 0.0001 + 10 * 0.01  # of one request, and at most 6000 bytes are shown
            assert limit - worst < spent <= limit
            assert cost_of(settings(limit))[1] == pytest.approx(spent)
        assert decisions(recorded(settings(100.0))) == len(server.requests)


# Nothing is paid for twice


def test_what_shapes_no_episode_changes_nothing_that_was_played():
    with Server(lambda request: playing(request.body)) as server:
        first = recorded(teacher(server))
        count = len(server.requests)
        changes = {"concurrency": 9, "timeout": 5.0, "max_retries": 1, "price": PRICE, "max_failure_rate": 0.5}
        assert same(recorded(teacher(server, max_tokens=None, **changes)), first)
        assert same(recorded(teacher(server), "edited code"), first)
        assert len(server.requests) == count
        assert not same(recorded(teacher(server, temperature=0.5)), []) and len(server.requests) == 2 * count


def test_more_seeds_and_more_steps_only_add():
    with Server(lambda request: playing(request.body)) as server:
        recorded(teacher(server, "0-3", 5))
        assert len(server.requests) == 20
        recorded(teacher(server, "9,0-3", 5))
        assert len(server.requests) == 25
        episodes = recorded(teacher(server, "9,0-3", 8))
        assert len(server.requests) == decisions(episodes) == 40
        assert [episode.seed for episode in recorded(teacher(server, "2,0", 5))] == [2, 0]
        assert len(server.requests) == 40


def _collect(environment: dict[str, str], settings: Teacher, out: Path) -> None:
    os.environ.update(environment)
    store.join(out, records(settings, "code"))


def in_a_process(function, *arguments) -> multiprocessing.Process:
    """Start it in a process of its own that has imported all already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["apprentice.players.chat", "apprentice.play", "openai"])
    environment = {name: os.environ[name] for name in ("APPRENTICE_CACHE", "TEST_KEY")}
    process = context.Process(target=function, args=(environment, *arguments))
    process.start()
    return process


@pytest.fixture
def counting(tmp_path):
    """A server in a process of its own: (its URL, the file with a line for each request)."""
    log = tmp_path / "requests"
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/endpoint.py", "0.02", log], stdout=subprocess.PIPE, text=True
    )
    yield type("Counting", (), {"url": process.stdout.readline().strip()}), log
    process.kill()
    process.wait()


def times(log: Path) -> dict[str, list[float]]:
    """When each request began and ended; one that never ended ends at infinity."""
    found: dict[str, list[float]] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        event, number, when = line.split()
        found.setdefault(number, [0.0, float("inf")])[event == "ended"] = float(when)
    return found


def test_killed_at_twenty_moments_no_request_is_made_twice_but_those_in_flight(counting, tmp_path, monkeypatch):
    server, log = counting
    settings, out = teacher(server, "0-5", 50, "image", concurrency=4), tmp_path / "killed.parquet"
    chosen, in_flight = random.Random(7), 0
    for moment in sorted(chosen.sample(range(1, 270), 20)):
        process = in_a_process(_collect, settings, out)
        while process.is_alive() and len(times(log)) < moment + in_flight:
            time.sleep(0.001)
        time.sleep(chosen.uniform(0, 0.02))
        assert process.is_alive(), "it ended before it could be killed"
        at = time.monotonic() - 0.05  # what was sent since then may not have been read
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        time.sleep(0.05)  # the server hears of what was sent just before
        in_flight += min(settings.endpoint.concurrency, sum(ended > at for _, ended in times(log).values()))
    assert not out.exists()
    _collect({}, settings, out)
    made, needed = len(times(log)), decisions(list(store.read(out)))
    assert 270 < needed <= made <= needed + in_flight
    monkeypatch.setenv("APPRENTICE_CACHE", str(tmp_path / "other cache"))
    _collect({}, settings, tmp_path / "undisturbed.parquet")
    assert (tmp_path / "undisturbed.parquet").read_bytes() == out.read_bytes()


def _collect_on_a_full_disk(environment: dict[str, str], settings: Teacher, out: Path) -> None:
    # A limit to the size of files stands for the disk's.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    try:
        _collect(environment, settings, out)
    except WorkError as error:
        out.with_suffix(".error").write_text(str(error))


def test_a_full_disk_is_an_error_and_the_ledger_stays_usable(counting, tmp_path):
    server, log = counting
    settings, out = teacher(server, "0-3", 100, concurrency=4), tmp_path / "trace.parquet"
    in_a_process(_collect_on_a_full_disk, settings, out).join(300)
    message = out.with_suffix(".error").read_text()
    assert "cannot be written" in message and "APPRENTICE_CACHE" in message
    (path,) = cache_folder().glob("replies/*.sqlite")
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        kept = db.execute("SELECT count(*) FROM replies").fetchone()[0]
    asked = len(times(log))
    assert 0 < kept < 300 and asked <= kept + 4
    _collect({}, settings, out)
    assert len(times(log)) == asked + decisions(list(store.read(out))) - kept


# The command


def checkout(folder: Path, **teachers: Teacher) -> Path:
    tree = YAML(typ="safe").load(ROOT / "params.yaml")
    tree["teachers"] = {
        name: json.loads(teacher.model_dump_json(exclude_unset=True)) | {"seeds": list(teacher.seeds)}
        for name, teacher in teachers.items()
    }
    folder.mkdir(exist_ok=True)
    YAML(typ="safe").dump(tree, folder / "params.yaml")
    return folder


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """collect in this folder; a variable set to nothing is missing."""
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, ROOT / "stages/collect.py", *arguments], cwd=folder, env=variables, **pipes
    )


def test_a_missing_key_is_told_first_with_the_variable_and_the_teacher(tmp_path):
    with Server() as server:
        folder = checkout(tmp_path / "top", gpt=teacher(server))
        process = command(folder, "gpt", TEST_KEY="")
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2 and not server.requests
        assert "teachers.gpt.endpoint: the environment variable TEST_KEY is not set" in errors
        assert "Traceback" not in errors
        assert [path.name for path in folder.iterdir()] == ["params.yaml"] and not cache_folder().exists()
        process = command(folder, "gpt", "--status", TEST_KEY="")
        assert "gpt: 0 of 4 episodes done" in process.communicate(timeout=300)[0]


def test_a_key_that_is_none_is_told_and_not_repeated(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-s3cret…")
    with pytest.raises(ConfigError, match="what TEST_KEY holds is no key") as raised:
        Client(Endpoint(model="m", api_key_env="TEST_KEY"), "x")
    assert "s3cret" not in str(raised.value)


def test_ctrl_c_exits_130_and_the_next_run_goes_on(tmp_path):
    with Server(lambda request: playing(request.body, 0.05)) as server:
        folder = checkout(tmp_path / "top", gpt=teacher(server, "0-3", 30, concurrency=4))
        process = command(folder, "gpt")
        while len(server.requests) < 20:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130, process.stderr.read()
        assert not (folder / "data/traces/gpt.parquet").exists()
        count = len(server.requests)
        process = command(folder, "gpt")
        assert process.wait(300) == 0, process.stderr.read()
        assert 120 <= len(server.requests) <= 120 + 4 and count > 19


def test_two_processes_on_one_teacher_wait_for_each_other_and_pay_once(tmp_path):
    with Server(lambda request: playing(request.body, 0.02)) as server:
        folders = [checkout(tmp_path / name, gpt=teacher(server, "0-5", 30)) for name in "ab"]
        processes = [command(folder, "gpt") for folder in folders]
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
        one, other = (folder / "data/traces/gpt.parquet" for folder in folders)
        assert one.read_bytes() == other.read_bytes()
        assert len(server.requests) == decisions(list(store.read(one))) == 180
        cost = json.loads((folders[0] / "metrics/cost/gpt.json").read_text())
    assert (cost["episodes"], cost["decisions"], cost["prompt_tokens"], cost["completion_tokens"]) == (
        6,
        180,
        18000,
        1800,
    )
    assert cost["cost_usd"] is cost["cost_per_decision_usd"] is cost["spent_usd"] is None


def test_the_key_stands_nowhere(tmp_path):
    """Not even if the endpoint repeats it, in an answer or in an error."""
    telling = completion(call("do") | {"content": f"Your key is {KEY}."}) | {"model": KEY}
    answers = [Answer(telling), Answer(telling), Answer(f"Bad {KEY}", 500), Answer(telling)]
    with Server(answers) as server:
        settings = teacher(server, "0-1", 3, concurrency=1, max_retries=0, max_failure_rate=0.5, price=PRICE)
        folder = checkout(tmp_path / "top", gpt=settings)
        process = command(folder, "gpt", OPENAI_LOG="debug")
        said = "".join(process.communicate(timeout=300))
        assert process.returncode == 0 and "Bad ***" in said, said
        server.answer = lambda request: Answer({"error": {"message": f"Wrong: {KEY}"}}, 401)
        process = command(folder, "gpt")
        errors = "".join(process.communicate(timeout=300))
        assert process.returncode == 2 and "Wrong: ***" in errors, errors
        said += errors + "".join(command(folder, "gpt", "--status").communicate(timeout=300))
        assert KEY in server.requests[0].headers["authorization"]
    assert KEY not in said
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"gpt.parquet", "gpt.json"} <= {file.name for file in files}
    assert len([file for file in files if file.suffix == ".sqlite"]) == 1
    for file in files:
        assert KEY.encode() not in file.read_bytes(), file
    (episode,) = store.read(folder / "data/traces/gpt.parquet")
    for step in episode.steps:
        assert (step.reply.message["content"], step.reply.model) == ("Your key is ***.", "***")
    with pytest.raises(NoAnswer) as raised, Server([Answer(f"Bad {KEY}", 500)]) as server:
        completed(server, max_retries=0)
    assert KEY not in repr(raised.value) and raised.value.__cause__ is None


def test_an_episode_has_as_many_calls_as_it_may_and_a_higher_cap_pays_only_for_the_rest(capfd):
    """A fault that is asked again is none of them, and an unreadable reply is one."""
    said = iter([Answer("", 500), Answer(completion(call("noop"))), Answer(completion({"content": "no"}))])
    with Server(lambda request: next(said, Answer(completion(call("noop"))))) as server:
        playing_by = teacher(server, seeds="0", max_steps=9)
        (episode,) = capped(playing_by, 3)
        assert [(step.invalid != "", step.ending) for step in episode.steps] == [
            (False, ""),
            (True, ""),
            (False, "calls"),
        ]
        assert len(server.requests) == 4
        assert "seed 0: 3 steps, no calls left, 0 achievements" in capfd.readouterr().err
        assert same(capped(playing_by, 3), [episode]) and len(server.requests) == 4
        (longer,) = capped(playing_by, 5)
        assert [step.reply for step in longer.steps[:3]] == [step.reply for step in episode.steps]
        assert len(longer.steps) == 5 and len(server.requests) == 6
        assert len(recorded(playing_by)[0].steps) == 9


def capped(teacher: Teacher, calls: int) -> list[Episode]:
    playing = replace(spec(teacher), max_calls=calls)
    return list(map(store.from_bytes, chat.record(playing, teacher.endpoint, "code", "teachers.gpt.endpoint")))


def test_an_endpoint_without_tools_is_told_how_to_write_a_call(tmp_path, capfd):
    text = 'I go.\n<tool_call>\n{"name": "act", "arguments": {"actions": ["move_left"]}}\n</tool_call>'

    with Server(lambda request: Answer(completion({"role": "assistant", "content": text}))) as server:
        playing_by = teacher(server, seeds="0", max_steps=3, use_tools=False)
        spec = Spec(playing_by.seeds, 3, playing_by.prompt, "x")
        [data] = chat.record(spec, playing_by.endpoint, "code", "teachers.x.endpoint")
    [episode] = [store.from_bytes(data)]
    assert [step.executed for step in episode.steps] == [("move_left",)] * 3
    assert all("tools" not in request.body for request in server.requests)
    assert "<tool_call>" in server.requests[0].body["messages"][0]["content"]
    assert "seed 0: 3 steps, 0 achievements: none" in capfd.readouterr().err
    assert endpoint(server).asked == endpoint(server, use_tools=True).asked  # what was kept before stays known
    with pytest.raises(ValueError, match="use_tools: false; remove one"):
        endpoint(server, use_tools=False, tool_choice="auto")
