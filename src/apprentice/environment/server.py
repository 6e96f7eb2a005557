"""The world's server: OpenEnv's protocol and plain HTTP, on the same sessions."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from apprentice.environment import http, mcp, openenv
from apprentice.environment.messages import Wrong
from apprentice.environment.rollouts import Rollouts, Student
from apprentice.environment.sessions import Sessions
from apprentice.params import Agent
from apprentice.world.observation import ACHIEVEMENTS, ACTIONS
from apprentice.world.world import VERSION


@dataclass(frozen=True)
class Limits:
    sessions: int
    """Open at once."""
    idle: float
    """Seconds without a request after which a session ends."""
    rollouts: int
    """Under way at once."""
    body: int = 65_536
    """Bytes of a request, or of a message; whoever starts the server holds it."""


def application(
    limits: Limits, scripted: tuple[str, ...], endpoints: dict[str, tuple[Agent, str]], students: dict[str, Student]
) -> FastAPI:
    """The server. scripted, endpoints, students: who can be asked for a rollout, see Rollouts. It asks for no key."""
    sessions = Sessions(limits.sessions, limits.idle)
    rollouts = Rollouts(scripted, endpoints, students, limits.rollouts)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        tidying = asyncio.create_task(sessions.tidy())
        yield
        tidying.cancel()
        sessions.close()
        await asyncio.to_thread(rollouts.close)

    app = FastAPI(title="apprentice: Crafter", version=version("apprentice"), lifespan=lifespan)
    app.include_router(openenv.routes(sessions))
    app.include_router(mcp.routes(sessions))
    app.include_router(http.routes(sessions, rollouts))

    @app.exception_handler(Wrong)
    async def refuse(_: Request, error: Wrong) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status)

    @app.get("/", include_in_schema=False)
    async def root() -> dict:
        return {"what": "Crafter, for trainers of agents", "see": ["/docs", "/info", "/health"]}

    @app.get("/info")
    async def info() -> dict:
        return {
            "name": "crafter",
            "protocol": "openenv 0.10",
            "version": app.version,
            "world_version": VERSION,
            "actions": ACTIONS,
            "achievements": ACHIEVEMENTS,
            "policies": rollouts.names,
            "sessions": {"open": len(sessions), "most": sessions.most},
            "rollouts": {"running": len(rollouts), "most": rollouts.most},
            "idle_seconds": limits.idle,
            "body_bytes": limits.body,
        }

    return app
