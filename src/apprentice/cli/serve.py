"""`apprentice serve`: something of ours over HTTP for others, behind a key: the world, or the student."""

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apprentice import params
from apprentice.cli import agents
from apprentice.errors import ConfigError

if TYPE_CHECKING:
    from apprentice.policy import Policy

WORLD = "world"


def _known() -> list[str]:
    try:
        settings = params.load()
    except ConfigError:
        settings = None
    return [WORLD, *agents.students(settings)]


def serve(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="world: Crafter. base, sft, distill, rl, or another of benchmark.students: the student.",
            autocompletion=_known,
        ),
    ],
    host: Annotated[str, typer.Option(help="Where to listen; other than on this machine alone needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    key_env: Annotated[
        str, typer.Option(help="The environment variable with the key that requests must bring.")
    ] = "APPRENTICE_SERVE_KEY",
    max_sessions: Annotated[int, typer.Option(min=1, help="world: so many at once.")] = 128,
    idle_timeout: Annotated[float, typer.Option(min=1, help="world: seconds after which an idle session ends.")] = 600,
    max_rollouts: Annotated[int, typer.Option(min=1, help="world: whole episodes played here at once.")] = 8,
) -> None:
    """Serve Crafter to others' trainers, or the student to others' evaluators; /docs describes what can be asked.

    world: by OpenEnv's protocol, and plain HTTP beside it. /rollout plays whole episodes, with the student or with the
    models behind an API of params.yaml, if there is one.

    The student: by OpenAI's chat API (/v1/chat/completions), on vLLM where compute.yaml says so.

    Example: apprentice serve rl, or apprentice serve world --port 8000
    """
    settings = params.load() if params.PATH.exists() else None
    if what != WORLD and what not in agents.students(settings):
        raise ConfigError(f"there is no {what!r} to serve; there is: {', '.join(_known())}")
    key = _key(key_env, host)
    listening = _listening(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    if what != WORLD:
        _student(what, settings, listening, key, address)
        return

    from apprentice.environment import server

    limits = server.Limits(max_sessions, idle_timeout, max_rollouts)
    students = {name: _rollouts(name, settings) for name in agents.students(settings)} if settings else {}
    world = server.application(limits, agents.SCRIPTED, agents.models(settings), students)
    told = f"Crafter on {address} (OpenEnv at /ws); Ctrl-C ends it"
    _run(world, listening, key, limits.body, 4 * max_sessions + 64, told)


def _student(
    name: str, settings: params.Params | None, listening: socket.socket, key: str | None, address: str
) -> None:
    if settings is None:
        raise ConfigError("there is no params.yaml here, which says how the student is shown a world; go to a checkout")
    adapter = agents.adapter(name, settings)

    from apprentice import compute, gpus
    from apprentice.serving import chat_api, on_vllm, vllm

    profile, serving = settings.active, compute.load().vllm
    sampling = profile.sampling
    plan = vllm.plan(serving, gpus.names(), training=False)
    with ExitStack() as stack:
        servers = vllm.Servers(plan, serving, Path(agents.BASE), profile.dtype, [Path(adapter)] if adapter else [])
        engine: chat_api.Engine
        if servers.servers:
            stack.enter_context(servers)
            policy = on_vllm.load(
                name, servers.servers, adapter, sampling.temperature, sampling.max_tokens, agents.BASE
            )
            engine = chat_api.VllmEngine(policy, sampling, serving.max_model_len)
        else:
            student = agents.student(name, settings)
            engine = chat_api.InProcessEngine(name, student.model, student.processor, sampling)
        told = f"{name} on {address}/v1 (OpenAI's chat API, the model {name}); Ctrl-C ends it"
        _run(chat_api.application(engine), listening, key, chat_api.BODY, 1024, told)


def _rollouts(name: str, settings: params.Params) -> tuple[Callable[[], "Policy"], params.Prompt]:
    """A student for one rollout: each draws anew from its seed, so that the same request gives the same episode."""

    load = cache(lambda: agents.student(name, settings))

    def policy() -> "Policy":
        from apprentice.serving.in_process import InProcess

        loaded = load()
        return InProcess(name, loaded.model, loaded.processor, loaded.temperature, loaded.max_tokens)

    return policy, settings.active.prompt


def _key(variable: str, host: str) -> str | None:
    """The key that requests must bring; None if there is none, which only this machine may do without."""
    from apprentice.environment.guard import is_loopback

    key = os.environ.get(variable, "").strip() or None
    if key is None and not is_loopback(host):
        raise ConfigError(
            f"on {host} others can reach it, so it needs a key: export {variable}=…, which requests must bring as "
            "Authorization: Bearer …; or leave --host out"
        )
    if key and not (key.isascii() and key.isprintable() and " " not in key and len(key) >= 16):
        raise ConfigError(f"{variable} must hold 16 characters or more, of ASCII and without spaces")
    return key


def _listening(host: str, port: int) -> socket.socket:
    """From now on the port is ours, and whoever connects waits until there is something to answer."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error}; choose others by --host and --port"
        ) from None
    return listening


def _run(app, listening: socket.socket, key: str | None, body: int, connections: int, told: str) -> None:
    """Until Ctrl-C. body: bytes of a request or a message; connections: how many; told: printed once it answers."""
    import uvicorn

    from apprentice.environment.guard import Guard

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            print(told, flush=True)

    config = uvicorn.Config(
        Guard(app, key, body),
        log_level="warning",
        ws_max_size=body,
        timeout_graceful_shutdown=3,
        limit_concurrency=connections,
    )
    Server(config).run([listening])
