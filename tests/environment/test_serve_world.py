"""`apprentice serve world`: real servers on this machine, spoken to by HTTP and WebSocket as OpenEnv's clients do.

OpenEnv's own client plays in with_openenv.py, in an environment of its own: `make test-openenv`.
"""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
from command_line import run, write_params
from endpoint import Answer, Server, call, completion, playing
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from apprentice import params
from apprentice.environment import guard
from apprentice.environment.messages import Busy, NoSuchSession
from apprentice.environment.sessions import Sessions
from apprentice.params import Prompt
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.serving import in_process
from apprentice.world import ACTIONS, World, png

KEY = "a key of this test, no secret".replace(" ", "-")
BEARER = {"Authorization": f"Bearer {KEY}"}
PAID = "sk-of-this-test-no-secret"


@contextmanager
def serving(folder: Path, *arguments: str, port: int = 0, **environment: str):
    """The command, in a process of its own. Gives its address and the process."""
    command = [sys.executable, "-c", "from apprentice.cli import main; main()", "serve", *arguments]
    process = subprocess.Popen(
        [*command, "--port", str(port)], cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        yield line.split()[2] if line else "", process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        process.stdout.close()


@pytest.fixture(scope="module")
def endpoint():
    """A model behind an API; a test may set what it answers."""
    with Server(lambda request: playing(request.body)) as model:
        yield model


@pytest.fixture(scope="module")
def server(tmp_path_factory, endpoint):
    """For this machine only, beside a params.yaml with the agent `api`, one rollout at a time."""
    folder = tmp_path_factory.mktemp("served")
    write_params(folder, endpoint.url, "TEST_KEY")
    environment = {"APPRENTICE_CACHE": str(folder / "cache"), "TEST_KEY": PAID}
    with serving(folder, "world", "--max-rollouts", "1", **environment) as (url, process):
        yield url, process


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """With a key, for two sessions, which may be idle for two seconds; no params.yaml."""
    narrow = ("world", "--host", "0.0.0.0", "--max-sessions", "2", "--idle-timeout", "2")
    with serving(tmp_path_factory.mktemp("guarded"), *narrow, APPRENTICE_SERVE_KEY=KEY) as (url, process):
        yield url.replace("0.0.0.0", "127.0.0.1"), process


def ws(url: str) -> str:
    return url.replace("http://", "ws://") + "/ws"


async def ask(socket, kind: str, **data) -> dict:
    await socket.send(json.dumps({"type": kind, "data": data} if kind in ("reset", "step") else {"type": kind}))
    return json.loads(await socket.recv())


def picture(answer: dict) -> np.ndarray:
    return png.decode(base64.b64decode(answer["observation"]["image"]))


def test_health_and_info_say_what_there_is(server):
    url, _ = server
    assert httpx2.get(f"{url}/health").json() == {"status": "healthy"}
    assert "/info" in httpx2.get(url).json()["see"]
    info = httpx2.get(f"{url}/info").json()
    assert info["actions"] == list(ACTIONS) and info["policies"] == [
        "random",
        "noop",
        "expert",
        "base",
        "sft",
        "distill",
        "rl",
        "api",
    ]
    assert httpx2.get(f"{url}/schema").json()["action"]["properties"]["action"]["enum"] == list(ACTIONS)
    assert httpx2.get(f"{url}/metadata").json()["name"] == "crafter"


def test_an_episode_by_websocket_is_that_of_the_world(server):
    async def episode():
        world = World(11, max_steps=40)
        expected = world.reset()
        async with connect(ws(server[0])) as socket:
            answer = await ask(socket, "reset", seed=11, max_steps=40, episode_id="mine")
            assert answer["type"] == "observation" and answer["data"]["reward"] is None
            generator, steps = np.random.default_rng(0), -1
            while True:
                seen = answer["data"]["observation"]
                assert (picture(answer["data"]) == expected.image).all()
                assert seen["vitals"] == expected.vitals and seen["text"].startswith("health")
                assert (seen["seed"], seen["step"]) == (11, steps := steps + 1)
                if world.done:
                    break
                action = ACTIONS[generator.integers(17)]
                outcome = world.step(action)
                expected = outcome.observation
                answer = await ask(socket, "step", action=action)
                assert answer["data"]["reward"] == outcome.reward and answer["data"]["done"] == outcome.done
                assert answer["data"]["observation"]["unlocked"] == list(outcome.unlocked)
            state = (await ask(socket, "state"))["data"]
            assert state["step_count"] == 40 and state["done"] and state["episode_id"] == "mine" and state["seed"] == 11
            over = await ask(socket, "step", action="noop")
            assert over["data"] == {"message": "the episode is over: reset first", "code": "EXECUTION_ERROR"}
            assert not (await ask(socket, "reset", seed=1))["data"]["done"]

    asyncio.run(episode())


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        ("{", "INVALID_JSON", "must be JSON"),
        (b"\x00", "INVALID_JSON", "text frame"),
        ("[" * 20_000, "INVALID_JSON", "must be JSON"),
        ("[1]", "UNKNOWN_TYPE", "reset, step, state or close"),
        ('{"type": ["step"]}', "UNKNOWN_TYPE", "reset, step, state or close"),
        ('{"type": "step", "data": {"action": "fly"}}', "VALIDATION_ERROR", "action: Input should be 'noop'"),
        ('{"type": "step", "data": 7}', "VALIDATION_ERROR", "step"),
        ('{"type": "reset", "data": {"seed": -1}}', "VALIDATION_ERROR", "seed"),
        ('{"type": "reset", "data": {"size": 100000}}', "VALIDATION_ERROR", "size"),
        ('{"type": "reset", "data": {"sead": 1}}', "VALIDATION_ERROR", "sead"),
        ('{"type": "step", "data": {"action": "noop"}}', "EXECUTION_ERROR", "reset first"),
    ],
)
def test_a_wrong_message_is_answered_and_the_session_goes_on(server, sent, code, said):
    async def converse():
        async with connect(ws(server[0])) as socket:
            await socket.send(sent)
            error = json.loads(await socket.recv())
            assert error["type"] == "error" and error["data"]["code"] == code and said in error["data"]["message"]
            assert (await ask(socket, "reset", seed=1))["type"] == "observation"

    asyncio.run(converse())


def test_the_same_by_plain_http(server):
    with httpx2.Client(base_url=server[0], timeout=30) as http:
        begun = http.post("/sessions", json={"seed": 5, "max_steps": 3})
        assert begun.status_code == 201
        name = begun.json()["session_id"]
        world = World(5, max_steps=3)
        assert (picture(begun.json()) == world.reset().image).all()
        for action in ("move_left", "do", "noop"):
            answer = http.post(f"/sessions/{name}/step", json={"action": {"action": action}}).json()
            outcome = world.step(action)
            assert (picture(answer) == outcome.observation.image).all() and answer["done"] == outcome.done
        over = http.post(f"/sessions/{name}/step", json={"action": {"action": "noop"}})
        assert over.status_code == 409 and "reset first" in over.json()["detail"]
        assert http.post(f"/sessions/{name}/step", json={"action": {"action": "fly"}}).status_code == 422
        assert http.post(f"/sessions/{name}/reset", json={"seed": 6}).json()["done"] is False
        assert http.get(f"/sessions/{name}/state").json()["seed"] == 6
        assert http.delete(f"/sessions/{name}").status_code == 204
        gone = http.post(f"/sessions/{name}/step", json={"action": {"action": "noop"}})
        assert gone.status_code == 404 and "POST /sessions" in gone.json()["detail"]


def rpc(http, method: str, **params) -> dict:
    body = {"jsonrpc": "2.0", "id": 5, "method": method, "params": params}
    answer = http.post("/mcp", json=body).json()
    assert answer["jsonrpc"] == "2.0" and answer["id"] == 5
    return answer


def test_a_tool_call_by_mcp_moves_the_session_that_a_websocket_resets(server):
    world = World(5, max_steps=4)
    world.reset()
    with httpx2.Client(base_url=server[0], timeout=30) as http:
        name = rpc(http, "openenv/session/create")["result"]["session_id"]
        act = {"name": "act", "session_id": name}
        early = rpc(http, "tools/call", arguments={"actions": ["noop"]}, **act)["result"]
        assert early["isError"] and "reset first" in early["content"][0]["text"]

        async def reset():
            async with connect(f"{ws(server[0])}?session_id={name}") as socket:
                await ask(socket, "reset", seed=5, max_steps=4)

        asyncio.run(reset())
        [tool] = rpc(http, "tools/list", session_id=name)["result"]["tools"]
        assert tool["name"] == "act" and tool["inputSchema"]["required"] == ["actions"]
        outcomes = [world.step(action) for action in ("move_left", "do")]
        found = rpc(http, "tools/call", arguments={"actions": ["move_left", "do"]}, **act)["result"]
        assert not found["isError"] and found["structuredContent"]["reward"] == sum(one.reward for one in outcomes)
        shown = png.decode(base64.b64decode(found["content"][1]["data"]))
        assert (shown == outcomes[-1].observation.image).all()
        wrong = rpc(http, "tools/call", arguments={"actions": ["fly"]}, **act)["result"]
        assert wrong["isError"] and "unknown action 'fly'" in wrong["content"][0]["text"]
        last = rpc(http, "tools/call", arguments={"actions": ["noop"] * 9}, **act)["result"]["structuredContent"]
        assert last["done"] and last["observation"]["step"] == 4
        assert rpc(http, "openenv/session/close", session_id=name)["result"]["closed"]
        assert rpc(http, "tools/call", arguments={"actions": ["noop"]}, **act)["error"]["code"] == -32602
        assert rpc(http, "reset")["error"]["code"] == -32601
        assert http.post("/mcp", json={}).json()["error"]["code"] == -32600
        assert http.post("/mcp", content="{").json()["error"]["code"] == -32700


def test_bodies_and_messages_have_a_limit(server):
    url, _ = server
    long = "x" * 70_000
    assert httpx2.post(f"{url}/sessions", content=long).status_code == 413
    assert httpx2.post(f"{url}/sessions", content=(part.encode() for part in (long[:40_000],) * 2)).status_code == 413

    async def send():
        async with connect(ws(url)) as socket:
            await socket.send(long)
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd.code == 1009

    asyncio.run(send())


def test_a_web_page_cannot_reach_a_server_without_a_key(server):
    url, _ = server
    assert httpx2.get(f"{url}/info", headers={"Origin": "https://evil.example"}).status_code == 403
    assert httpx2.get(f"{url}/info", headers={"Host": "rebound.example"}).status_code == 403

    async def page():
        with pytest.raises(InvalidStatus):
            await connect(ws(url), origin="https://evil.example")

    asyncio.run(page())


def test_64_sessions_at_once_hold_and_are_each_their_own(server):
    url, process = server

    async def session(seed: int, latencies: list[float]) -> bool:
        world = World(seed, max_steps=200)
        expected = world.reset()
        async with connect(ws(url)) as socket:
            answer = await ask(socket, "reset", seed=seed)
            for step in range(15):
                if not (picture(answer["data"]) == expected.image).all():
                    return False
                action = ACTIONS[(seed + step) % 17]
                began = time.monotonic()
                answer = await ask(socket, "step", action=action)
                latencies.append(time.monotonic() - began)
                expected = world.step(action).observation
        return True

    async def together() -> tuple[list[bool], list[float]]:
        latencies: list[float] = []
        return await asyncio.gather(*(session(seed, latencies) for seed in range(64))), latencies

    before = psutil.Process(process.pid).memory_info().rss
    right, latencies = asyncio.run(together())
    grown = psutil.Process(process.pid).memory_info().rss - before
    print(f"64 sessions: {grown / 64 / 1e6:.1f} MB each, step p50 {np.median(latencies) * 1000:.0f} ms")
    assert all(right) and len(latencies) == 64 * 15
    assert grown < 64 * 8e6
    deadline = time.monotonic() + 10
    while httpx2.get(f"{url}/info").json()["sessions"]["open"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert httpx2.get(f"{url}/info").json()["sessions"]["open"] == 0


def test_sessions_are_limited_and_idle_ones_end(guarded):
    url, _ = guarded

    async def converse():
        def socket():
            return connect(ws(url), additional_headers=BEARER)

        async with socket() as first:
            await ask(first, "reset", seed=1)
            async with socket() as second, socket() as third:
                full = json.loads(await third.recv())
                assert full["data"]["code"] == "CAPACITY_REACHED" and "2 sessions" in full["data"]["message"]
                assert httpx2.post(f"{url}/sessions", json={}, headers=BEARER).status_code == 503
                idle = json.loads(await second.recv())
                assert idle["data"]["code"] == "SESSION_ERROR" and "idle for 2 s" in idle["data"]["message"]
                with pytest.raises(ConnectionClosed):
                    await second.recv()

    asyncio.run(converse())


def test_an_idle_session_of_plain_http_makes_room_for_another():
    sessions = Sessions(most=1, idle=600)
    name, session = sessions.begin()
    with pytest.raises(Busy):
        sessions.begin()
    session.seen -= 606
    sessions.begin()
    with pytest.raises(NoSuchSession, match="idle for 600 s"):
        sessions.named(name)


def test_the_key_is_asked_for_everywhere_but_for_health(guarded):
    url, process = guarded

    async def by_socket():
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            with pytest.raises(InvalidStatus) as refused:
                await connect(ws(url), additional_headers=headers)
            assert refused.value.response.status_code == 403
        async with connect(ws(url), additional_headers=BEARER) as socket:
            assert (await ask(socket, "reset", seed=1))["type"] == "observation"
        async with connect(ws(url).replace("ws://", f"ws://apprentice:{KEY}@")) as socket:
            assert (await ask(socket, "reset", seed=1))["type"] == "observation"

    assert httpx2.get(f"{url}/health").status_code == 200
    for path in ("/info", "/docs", "/openapi.json", "/nothing"):
        assert httpx2.get(url + path).status_code == 401
        assert httpx2.get(url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert httpx2.get(f"{url}/info", headers=BEARER).json()["policies"] == ["random", "noop", "expert"]
    asyncio.run(by_socket())
    assert KEY not in " ".join(psutil.Process(process.pid).cmdline())


def test_a_server_for_others_does_not_start_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("APPRENTICE_SERVE_KEY", raising=False)
    done = run(tmp_path, "serve", "world", "--host", "0.0.0.0")
    assert done.returncode == 2 and "export APPRENTICE_SERVE_KEY=" in done.stderr
    monkeypatch.setenv("APPRENTICE_SERVE_KEY", "short")
    done = run(tmp_path, "serve", "world", "--host", "0.0.0.0")
    assert done.returncode == 2 and "16 characters" in done.stderr and "short" not in done.stderr


def test_only_what_there_is_can_be_served(tmp_path):
    done = run(tmp_path, "serve", "wurld")
    assert done.returncode == 2 and "no 'wurld' to serve; there is: world" in done.stderr


def test_killed_and_started_again_it_says_what_became_of_the_sessions(tmp_path):
    async def cut(url: str, process: subprocess.Popen) -> str:
        async with connect(ws(url)) as socket:
            await ask(socket, "reset", seed=1)
            name = httpx2.post(f"{url}/sessions", json={}).json()["session_id"]
            process.kill()
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(ask(socket, "step", action="noop"), 10)
        return name

    with serving(tmp_path, "world") as (url, process):
        name = asyncio.run(cut(url, process))
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")
    with serving(tmp_path, "world", port=int(url.rpartition(":")[2])) as (again, _):
        assert again == url
        done = run(tmp_path, "serve", "world", "--port", url.rpartition(":")[2])
        assert done.returncode == 2 and "--port" in done.stderr
        gone = httpx2.post(f"{url}/sessions/{name}/step", json={"action": {"action": "noop"}})
        assert gone.status_code == 404 and "started anew" in gone.json()["detail"]
        assert httpx2.post(f"{url}/sessions", json={"seed": 1}).status_code == 201


def test_a_rollout_is_the_episode_that_the_pipeline_plays(server):
    url, _ = server
    trace = httpx2.post(f"{url}/rollout", json={"policy": "expert", "seed": 9, "max_steps": 25}, timeout=60).json()
    (episode,) = play(Scripted("expert"), Spec([9], 25, Prompt()))
    assert trace["achievements"] == list(episode.unlocked) and trace["reward"] == pytest.approx(episode.reward)
    assert [row["executed"] for row in trace["decisions"]] == [list(step.executed) for step in episode.steps]
    first = png.decode(base64.b64decode(trace["decisions"][0]["image"]))
    assert (first == episode.steps[0].observation.image).all()
    assert (
        "image"
        not in httpx2.post(
            f"{url}/rollout", json={"policy": "noop", "seed": 9, "max_steps": 2, "images": False}, timeout=60
        ).json()["decisions"][0]
    )


def test_a_rollout_of_the_student_is_the_same_again(tiny_folder, tmp_path):
    write_params(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/base").symlink_to(tiny_folder)
    shown = params.load(tmp_path / "params.yaml").active
    student = in_process.load("base", None, shown.dtype, 1.0, shown.sampling.max_tokens, 1, str(tiny_folder))
    (expected,) = play(student, Spec([9], 4, shown.prompt))
    asked = {"policy": "base", "seed": 9, "max_steps": 4, "images": False}
    with serving(tmp_path, "world") as (url, _):
        first, again = (httpx2.post(f"{url}/rollout", json=asked, timeout=120).json() for _ in range(2))
        missing = httpx2.post(f"{url}/rollout", json=asked | {"policy": "rl"}, timeout=60)
    assert first == again and [row["invalid"] for row in first["decisions"]] == [one.invalid for one in expected.steps]
    assert [row["content"] for row in first["decisions"]] == [one.reply.message["content"] for one in expected.steps]
    assert missing.status_code == 503 and "rl needs models/rl, which is not there" in missing.json()["detail"]


def test_a_rollout_asks_only_endpoints_that_the_server_was_started_with(server, endpoint):
    url, _ = server
    asked = {"policy": "api", "seed": 1, "max_steps": 5}
    one = httpx2.post(f"{url}/rollout", json=asked, timeout=60)
    assert one.status_code == 200 and one.json()["steps"] == 5 and len(endpoint.requests) == 5
    assert endpoint.requests[0].headers["authorization"] == f"Bearer {PAID}" and PAID not in one.text
    assert httpx2.post(f"{url}/rollout", json=asked, timeout=60).json() == one.json()
    assert len(endpoint.requests) == 5  # paid for once
    for wrong in ({"base_url": "http://169.254.169.254"}, {"api_key_env": "HOME"}):
        assert httpx2.post(f"{url}/rollout", json=asked | wrong).status_code == 422
    unknown = httpx2.post(f"{url}/rollout", json=asked | {"policy": "http://127.0.0.1:1/v1"})
    assert unknown.status_code == 409
    assert "there are random, noop, expert, base, sft, distill, rl, api" in unknown.json()["detail"]


def test_an_endpoint_that_fails_is_a_clean_error_and_slow_rollouts_hold_up_nobody(server, endpoint, monkeypatch):
    url, _ = server
    came, go_on, answers = threading.Event(), threading.Event(), [Answer(completion(call("noop")))]

    def answer(request):
        came.set()
        go_on.wait(60)
        return answers.pop() if answers else Answer("no", status=400)

    monkeypatch.setattr(endpoint, "answer", answer)

    async def together():
        async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
            slow = asyncio.create_task(http.post("/rollout", json={"policy": "api", "seed": 2}))
            try:
                assert await asyncio.to_thread(came.wait, 60)
                assert (await http.get("/health")).status_code == 200
                session = (await http.post("/sessions", json={"seed": 1})).json()["session_id"]
                assert (await http.delete(f"/sessions/{session}")).status_code == 204
                busy = await http.post("/rollout", json={"policy": "noop", "seed": 1})
                assert busy.status_code == 503 and "try again later" in busy.json()["detail"]
                assert not slow.done()
            finally:
                go_on.set()
            return await slow

    failed = asyncio.run(together())
    assert failed.status_code == 502 and "HTTP 400" in failed.json()["detail"]


def test_a_rollout_ends_when_whoever_asked_for_it_has_gone(server, endpoint, monkeypatch):
    url, _ = server
    go_on = threading.Event()
    monkeypatch.setattr(endpoint, "answer", lambda request: go_on.wait(60) and Answer(completion(call("noop"))))

    def running() -> int:
        return httpx2.get(f"{url}/info").json()["rollouts"]["running"]

    try:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{url}/rollout", json={"policy": "api", "seed": 3}, timeout=0.5)
        assert running() == 1
        deadline = time.monotonic() + 10
        while running():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        go_on.set()


def test_loopback_is_known_by_its_names():
    assert all(map(guard.is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")))
    assert not any(map(guard.is_loopback, ("0.0.0.0", "::", "10.0.0.1", "127.0.0.1.evil.example", "")))
