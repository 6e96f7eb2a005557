"""`apprentice serve`: something of ours over HTTP for others, behind a key. The world, for their trainers."""

import os
import socket
from typing import Annotated

import typer

from apprentice import params
from apprentice.cli import agents
from apprentice.errors import ConfigError

WHAT = ("world",)


def serve(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="world: Crafter.", autocompletion=lambda: list(WHAT))
    ] = "world",
    host: Annotated[str, typer.Option(help="Where to listen; other than on this machine alone needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    key_env: Annotated[
        str, typer.Option(help="The environment variable with the key that requests must bring.")
    ] = "APPRENTICE_SERVE_KEY",
    max_sessions: Annotated[int, typer.Option(min=1, help="Worlds at once.")] = 128,
    idle_timeout: Annotated[float, typer.Option(min=1, help="Seconds after which an idle session ends.")] = 600,
    max_rollouts: Annotated[int, typer.Option(min=1, help="Whole episodes played here at once.")] = 8,
) -> None:
    """Serve Crafter by OpenEnv's protocol (and plain HTTP), for others' trainers; /docs describes it.

    /rollout plays whole episodes with the models behind an API of params.yaml, if there is one.

    Example: apprentice serve --port 8000
    """
    if what not in WHAT:
        raise ConfigError(f"there is no {what!r} to serve; there is: {', '.join(WHAT)}")
    key = _key(key_env, host)
    listening = _listening(host, port)
    settings = params.load() if params.PATH.exists() else None

    from apprentice.environment import server

    limits = server.Limits(max_sessions, idle_timeout, max_rollouts)
    world = server.application(limits, agents.SCRIPTED, agents.models(settings))
    shown = f"[{host}]" if ":" in host else host
    print(f"Crafter on http://{shown}:{listening.getsockname()[1]} (OpenEnv at /ws); Ctrl-C ends it", flush=True)
    _run(world, listening, key, limits.body, connections=4 * max_sessions + 64)


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


def _run(app, listening: socket.socket, key: str | None, body: int, connections: int) -> None:
    """Until Ctrl-C. body: bytes that a request or a message may have; connections: how many there may be."""
    import uvicorn

    from apprentice.environment.guard import Guard

    config = uvicorn.Config(
        Guard(app, key, body),
        log_level="warning",
        ws_max_size=body,
        timeout_graceful_shutdown=3,
        limit_concurrency=connections,
    )
    uvicorn.Server(config).run([listening])
