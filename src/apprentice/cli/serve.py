"""`apprentice serve`: the world over HTTP for others' trainers."""

import os
import socket
from typing import Annotated

import typer

from apprentice import params
from apprentice.cli import agents
from apprentice.errors import ConfigError


def serve(
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
    key = os.environ.get(key_env, "").strip() or None
    settings = params.load() if params.PATH.exists() else None

    from apprentice.environment import openenv_server

    if key is None and not openenv_server.is_loopback(host):
        raise ConfigError(
            f"on {host} others can reach it, so it needs a key: export {key_env}=…, which requests must bring as "
            "Authorization: Bearer …; or leave --host out"
        )
    if key and not (key.isascii() and key.isprintable() and " " not in key and len(key) >= 16):
        raise ConfigError(f"{key_env} must hold 16 characters or more, of ASCII and without spaces")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error}; choose others by --host and --port"
        ) from None

    import uvicorn

    limits = openenv_server.Limits(max_sessions, idle_timeout, rollouts=max_rollouts)
    app = openenv_server.application(limits, key, agents.models(settings))
    config = uvicorn.Config(
        app,
        log_level="warning",
        ws_max_size=limits.body,
        timeout_graceful_shutdown=3,
        limit_concurrency=4 * max_sessions + 64,
    )
    shown = f"[{host}]" if ":" in host else host
    print(f"Crafter on http://{shown}:{listening.getsockname()[1]} (OpenEnv at /ws); Ctrl-C ends it", flush=True)
    uvicorn.Server(config).run([listening])
