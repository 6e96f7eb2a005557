"""Crafter over HTTP for others' trainers, in OpenEnv's protocol (openenv 0.10.0, `core/env_server/http_server.py`).

OpenEnv's clients hold a session by a WebSocket at /ws; others can have the same by plain HTTP at /sessions. Worlds are
moved in threads, so that nobody waits for another's step.

A wrong request gets an error that says what would be right, and its session goes on. The only exceptions that leave
this file's functions are those of a broken server.
"""

import asyncio
import base64
import binascii
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect, WebSocketState

from apprentice import prompt, store, world
from apprentice.endpoint.client import Client
from apprentice.endpoint.replies import Replies
from apprentice.errors import ConfigError, NoAnswer, WorkError
from apprentice.params import Agent, Prompt
from apprentice.play import Spec, play_one
from apprentice.players.chat import Chat
from apprentice.players.scripted import Scripted
from apprentice.policy import Policy
from apprentice.workers import cores
from apprentice.world import png
from apprentice.world.observation import ACTIONS, TILES
from apprentice.world.world import World

SCRIPTED = ("random", "noop", "expert")
_TEXT = Prompt(mode="text")
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Steps = Annotated[int, Field(ge=1, le=10_000)]


@dataclass(frozen=True)
class Limits:
    sessions: int = 128
    idle: float = 600.0
    """Seconds without a message after which a session ends."""
    body: int = 65_536
    """Bytes of a request, or of a message."""
    rollouts: int = 8
    """Under way at once."""


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Reset(_Asked):
    """What a session is started with."""

    seed: Seed | None = None
    """Of the world; without one, a random world."""
    episode_id: Annotated[str, Field(max_length=255)] | None = None
    max_steps: Steps = 10_000
    size: Annotated[int, Field(ge=18, le=512)] = world.SIZE
    """Side of the picture in pixels."""


class Action(_Asked):
    """One environment step."""

    action: Literal[ACTIONS]
    metadata: dict[str, Any] = {}
    """OpenEnv's; not looked at."""


class Step(_Asked):
    """The body of a step by plain HTTP."""

    action: Action


class Observation(BaseModel):
    """After the step."""

    image: str
    """A PNG in base64."""
    text: str
    """Status, inventory and surroundings in words."""
    view: list[list[str]]
    """The 7 rows of 9 cells around the player, by name."""
    vitals: dict[str, int]
    inventory: dict[str, int]
    facing: tuple[int, int]
    position: tuple[int, int]
    sleeping: bool
    daylight: float
    unlocked: list[str]
    """Achievements unlocked by this step."""
    died: bool


class State(BaseModel):
    episode_id: str | None
    step_count: int
    seed: int | None
    max_steps: int
    done: bool
    achievements: list[str]


class Rollout(_Asked):
    """A whole episode, played here."""

    policy: str
    """A built-in one, or an endpoint that this server was started with."""
    seed: Seed
    max_steps: Steps = 200
    images: bool = True


class Wrong(Exception):
    """A request that cannot be carried out; the message says what would be right."""


class Session:
    """One episode at a time. Its methods block, and are called in a thread, one after the other."""

    def __init__(self):
        self.turn = asyncio.Lock()
        self.seen = time.monotonic()
        self._world: World | None = None
        self._asked, self._steps, self._achievements = Reset(), 0, ()

    def reset(self, asked: Reset) -> dict:
        if asked.seed is None:
            asked = asked.model_copy(update={"seed": secrets.randbelow(2**31)})
        self._world = World(asked.seed, max_steps=asked.max_steps, size=asked.size)
        self._asked, self._steps, self._achievements = asked, 0, ()
        return _answer(self._world.reset(), (), None, False, False)

    def step(self, asked: Action) -> dict:
        if self._world is None:
            raise Wrong("there is no episode yet: reset first")
        if self._world.done:
            raise Wrong("the episode is over: reset first")
        outcome = self._world.step(asked.action)
        self._steps += 1
        self._achievements += outcome.unlocked
        return _answer(outcome.observation, outcome.unlocked, outcome.reward, outcome.done, outcome.died)

    @property
    def state(self) -> dict:
        return State(
            episode_id=self._asked.episode_id,
            step_count=self._steps,
            seed=self._asked.seed,
            max_steps=self._asked.max_steps,
            done=self._world is None or self._world.done,
            achievements=list(self._achievements),
        ).model_dump()


def _answer(seen: world.Observation, unlocked: tuple, reward: float | None, done: bool, died: bool) -> dict:
    """OpenEnv's form of a step's result (`serialize_observation`)."""
    observation = {
        "image": base64.b64encode(png.encode(seen.image)).decode(),
        "text": prompt.text(seen, _TEXT),
        "view": [[TILES[code] for code in row] for row in seen.view],
        "vitals": seen.vitals,
        "inventory": seen.inventory,
        "facing": seen.facing,
        "position": seen.position,
        "sleeping": seen.sleeping,
        "daylight": float(seen.daylight),
        "unlocked": unlocked,
        "died": died,
    }
    return {"observation": observation, "reward": reward, "done": done}


class Sessions:
    """Those under way, at most so many, each until it ends or has been idle for too long."""

    def __init__(self, limits: Limits):
        self.limits, self.open = limits, {}
        self._threads = ThreadPoolExecutor(min(32, 2 * cores()), thread_name_prefix="world")

    def begin(self) -> str:
        """Raises Wrong when there are too many."""
        self.end_idle()
        if len(self.open) >= self.limits.sessions:
            raise Wrong(f"all {self.limits.sessions} sessions are taken; close one, or try again later")
        name = secrets.token_urlsafe(16)
        self.open[name] = Session()
        return name

    def end(self, name: str) -> bool:
        return self.open.pop(name, None) is not None

    def end_idle(self) -> None:
        """WebSockets see to themselves, a little earlier."""
        oldest = time.monotonic() - self.limits.idle - 5
        for name in [name for name, session in self.open.items() if session.seen < oldest]:
            del self.open[name]

    async def call(self, session: Session, function: Callable, *args: Any) -> Any:
        """In a thread; a session's calls wait for each other."""
        async with session.turn:
            session.seen = time.monotonic()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
            finally:
                session.seen = time.monotonic()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Rollouts:
    """Whole episodes, in a thread with an event loop of its own: its worlds' steps hold up no session.

    endpoints: models by name, each with where its settings stand. A request can name one, and nothing else of
    it: neither an address nor a key.
    """

    def __init__(self, endpoints: dict[str, tuple[Agent, str]], limits: Limits):
        self.endpoints, self.limits = endpoints, limits
        self._clients: dict[str, tuple[Client, Replies]] = {}
        self._running: set[Future] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        return [*SCRIPTED, *self.endpoints]

    @property
    def running(self) -> int:
        return len(self._running)

    def start(self, asked: Rollout) -> Future:
        """Its episode's rows and summary, in the future. Raises Wrong."""
        if asked.policy not in self.names:
            raise Wrong(f"there is no policy {asked.policy!r} here; there are {', '.join(self.names)}")
        if self.running >= self.limits.rollouts:
            raise Wrong(f"{self.limits.rollouts} rollouts are under way; try again later")
        future = asyncio.run_coroutine_threadsafe(self._play(asked), self._loop)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    async def _play(self, asked: Rollout) -> dict:
        model, whose = self.endpoints.get(asked.policy, (None, ""))
        settings = model.prompt if model else Prompt()
        policy = self._chat(asked.policy, model, whose) if model else Scripted(asked.policy)
        episode = await play_one(_Fair(policy), Spec([asked.seed], asked.max_steps, settings, asked.policy), asked.seed)
        rows = await asyncio.to_thread(lambda: store.to_table(episode).to_pylist())
        return {
            "policy": asked.policy,
            "seed": asked.seed,
            "steps": episode.length,
            "reward": episode.reward,
            "achievements": episode.unlocked,
            "died": episode.steps[-1].died,
            "decisions": [_row(row, asked.images) for row in rows],
        }

    def _chat(self, name: str, model: Agent, whose: str) -> Chat:
        """A new one, which knows what the last ones were answered, so that nothing is paid for twice; the client is one
        for all, so that max_cost_usd holds for them together."""
        if name not in self._clients:
            replies = Replies(name, model.endpoint.asked)
            self._clients[name] = Client(model.endpoint, whose, replies.spent() or 0.0), replies
        return Chat(name, *self._clients[name])

    def close(self) -> None:
        async def close() -> None:
            for client, replies in self._clients.values():
                await client.__aexit__()
                replies.__exit__()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


class _Fair:
    """A policy between whose turns others have theirs, even if it never waits."""

    def __init__(self, policy: Policy):
        self.name, self.policy = policy.name, policy

    def begin(self, seed: int) -> "_FairPlayer":
        return _FairPlayer(self.policy.begin(seed))


class _FairPlayer:
    def __init__(self, player):
        self.player, self.end = player, player.end

    async def reply(self, turn):
        await asyncio.sleep(0)
        return await self.player.reply(turn)


def _row(row: dict, images: bool) -> dict:
    """A row of a trace as JSON: the picture as PNG in base64, the view by name."""
    image = row.pop("image")
    view = row.pop("view")
    columns = world.VIEW[0]
    cells = [TILES[code] for code in view]
    row["view"] = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    if images:
        row["image"] = base64.b64encode(image["bytes"]).decode()
    return row


class Guard:
    """Before anything else: the key, the size of the body, and no strange web page's script.

    Without a key the server listens to this machine only; a browser on it could still be made to send requests, by
    another site's page or by a name that points here, so those with an Origin or another Host are turned away.
    """

    def __init__(self, app: ASGIApp, key: str | None, limits: Limits):
        self.app, self.key, self.limits = app, key and key.encode(), limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {name: value for name, value in scope["headers"]}
        if self.key is None and (b"origin" in headers or not _local(headers.get(b"host", b"").decode("latin-1"))):
            return await self._refuse(scope, receive, send, 403, "requests of web pages are refused")
        if self.key and scope["path"] != "/health" and not _knows(headers.get(b"authorization", b""), self.key):
            return await self._refuse(
                scope, receive, send, 401, "the header Authorization must be: Bearer, and the key of this server"
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.body:
            return await self._refuse(scope, receive, send, 413, f"a body may have {self.limits.body} bytes")
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            if message["type"] == "http.request":
                got += len(message.get("body", b""))
                if got > self.limits.body:
                    raise HTTPException(413, f"a body may have {self.limits.body} bytes")
            return message

        await self.app(scope, counted, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, status: int, why: str) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": why})  # before it's accepted: HTTP 403
            return
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        await JSONResponse({"detail": why}, status, headers)(scope, receive, send)


def _local(host: str) -> bool:
    return is_loopback(host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host)


def is_loopback(host: str) -> bool:
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _knows(authorization: bytes, key: bytes) -> bool:
    """The key as a bearer's, or as the password of a URL: older OpenEnv clients can send no header."""
    kind, _, given = authorization.partition(b" ")
    if kind.lower() == b"basic":
        try:
            given = base64.b64decode(given).partition(b":")[2]
        except binascii.Error:
            return False
    return secrets.compare_digest(given.strip(), key)


def application(limits: Limits, key: str | None, endpoints: dict[str, tuple[Agent, str]]) -> ASGIApp:
    """The server. key: what every request but /health must bring; None for none."""
    sessions, rollouts = Sessions(limits), Rollouts(endpoints, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        async def tidy() -> None:
            while True:
                await asyncio.sleep(min(30.0, limits.idle))
                sessions.end_idle()

        tidying = asyncio.create_task(tidy())
        yield
        tidying.cancel()
        sessions.close()
        await asyncio.to_thread(rollouts.close)

    app = FastAPI(title="apprentice: Crafter", version=version("apprentice"), lifespan=lifespan)

    @contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except Wrong as error:
            raise HTTPException(503 if "later" in str(error) else 409, str(error)) from None

    def found(name: str) -> Session:
        if name not in sessions.open:
            raise HTTPException(
                404,
                f"there is no such session: it was closed, idle for {limits.idle:g} s, or the server was started anew; "
                "POST /sessions begins another",
            )
        return sessions.open[name]

    @app.get("/health")
    async def health() -> dict:
        return {"status": "healthy"}

    @app.get("/info")
    async def info() -> dict:
        return {
            "name": "crafter",
            "protocol": "openenv 0.10",
            "version": app.version,
            "world_version": world.VERSION,
            "actions": ACTIONS,
            "achievements": world.ACHIEVEMENTS,
            "policies": rollouts.names,
            "sessions": {"open": len(sessions.open), "most": limits.sessions},
            "rollouts": {"running": rollouts.running, "most": limits.rollouts},
            "idle_seconds": limits.idle,
            "body_bytes": limits.body,
        }

    @app.get("/metadata")
    async def metadata() -> dict:
        return {
            "name": "crafter",
            "description": "Crafter, deterministic: the same seed and actions give the same bytes. Send one of the "
            "17 actions a step; the reward is +1 for each achievement unlocked and 0.1 for a health point.",
            "version": app.version,
        }

    @app.get("/schema")
    async def schema() -> dict:
        kinds = {"action": Action, "observation": Observation, "state": State}
        return {name: kind.model_json_schema() for name, kind in kinds.items()}

    @app.post("/sessions", status_code=201)
    async def begin(asked: Reset) -> dict:
        with told():
            name = sessions.begin()
        return {"session_id": name, **await sessions.call(sessions.open[name], sessions.open[name].reset, asked)}

    @app.post("/sessions/{name}/reset")
    async def reset(name: str, asked: Reset) -> dict:
        session = found(name)
        return await sessions.call(session, session.reset, asked)

    @app.post("/sessions/{name}/step")
    async def step(name: str, asked: Step) -> dict:
        session = found(name)
        with told():
            return await sessions.call(session, session.step, asked.action)

    @app.get("/sessions/{name}/state")
    async def state(name: str) -> dict:
        return found(name).state

    @app.delete("/sessions/{name}", status_code=204)
    async def end(name: str) -> None:
        found(name)
        sessions.end(name)

    @app.post("/rollout")
    async def rollout(asked: Rollout, request: Request) -> dict:
        with told():
            future = rollouts.start(asked)
        playing = asyncio.wrap_future(future)
        try:
            while not (await asyncio.wait([playing], timeout=1))[0]:
                if await request.is_disconnected():
                    raise HTTPException(499, "whoever asked for it has gone")
            return playing.result()
        except NoAnswer as error:
            raise HTTPException(502, f"{asked.policy}: {error}") from None
        except (ConfigError, WorkError) as error:
            raise HTTPException(503, str(error)) from None
        finally:
            future.cancel()

    @app.websocket("/ws")
    async def openenv(socket: WebSocket) -> None:
        await socket.accept()
        try:
            name = sessions.begin()
        except Wrong as error:
            await socket.send_json(_error("CAPACITY_REACHED", str(error)))
            return await socket.close(1013)
        try:
            await _converse(socket, sessions, sessions.open[name])
        except (WebSocketDisconnect, RuntimeError):
            if socket.client_state == socket.application_state == WebSocketState.CONNECTED:
                raise
        finally:
            sessions.end(name)

    return Guard(app, key, limits)


async def _converse(socket: WebSocket, sessions: Sessions, session: Session) -> None:
    """OpenEnv's messages: reset, step, state, close."""
    answers: dict[str, Callable[[Any], Awaitable[dict]]] = {
        "reset": lambda data: sessions.call(session, session.reset, Reset.model_validate(data)),
        "step": lambda data: sessions.call(session, session.step, Action.model_validate(data)),
    }
    while True:
        try:
            message = await asyncio.wait_for(socket.receive_json(), sessions.limits.idle)
        except TimeoutError:
            await socket.send_json(_error("SESSION_ERROR", f"idle for {sessions.limits.idle:g} s: the session is over"))
            return await socket.close(1000)
        except (ValueError, KeyError, RecursionError):
            await socket.send_json(_error("INVALID_JSON", "a message must be JSON in a text frame"))
            continue
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "close":
            return await socket.close()
        try:
            if kind == "state":
                answer = {"type": "state", "data": session.state}
            elif kind in ("reset", "step"):
                answer = {"type": "observation", "data": await answers[kind](message.get("data", {}))}
            else:
                answer = _error("UNKNOWN_TYPE", "type must be reset, step, state or close")
        except ValidationError as error:
            places = [(".".join(map(str, place["loc"])) or kind, place["msg"]) for place in error.errors()]
            answer = _error("VALIDATION_ERROR", "; ".join(f"{place}: {why}" for place, why in places))
        except Wrong as error:
            answer = _error("EXECUTION_ERROR", str(error))
        await socket.send_json(answer)


def _error(code: str, message: str) -> dict:
    return {"type": "error", "data": {"message": message, "code": code}}
