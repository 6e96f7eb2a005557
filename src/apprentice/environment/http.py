"""The world by plain HTTP, for those without an OpenEnv client: sessions at /sessions, whole episodes at /rollout."""

import asyncio

from fastapi import APIRouter, HTTPException, Request

from apprentice.environment.messages import ResetRequest, RolloutRequest, StepRequest
from apprentice.environment.rollouts import Rollouts
from apprentice.environment.sessions import Sessions
from apprentice.errors import ConfigError, NoAnswer, WorkError


def routes(sessions: Sessions, rollouts: Rollouts) -> APIRouter:
    """They raise Wrong, whose status and message whoever includes them has to send."""
    router = APIRouter()

    @router.post("/sessions", status_code=201)
    async def begin(asked: ResetRequest) -> dict:
        name, session = sessions.begin()
        return {"session_id": name, **await sessions.call(session, session.reset, asked)}

    @router.post("/sessions/{name}/reset")
    async def reset(name: str, asked: ResetRequest) -> dict:
        session = sessions.named(name)
        return await sessions.call(session, session.reset, asked)

    @router.post("/sessions/{name}/step")
    async def step(name: str, asked: StepRequest) -> dict:
        session = sessions.named(name)
        return await sessions.call(session, session.step, asked.action.action)

    @router.get("/sessions/{name}/state")
    async def state(name: str) -> dict:
        return sessions.named(name).state

    @router.delete("/sessions/{name}", status_code=204)
    async def end(name: str) -> None:
        sessions.named(name)
        sessions.end(name)

    @router.post("/rollout")
    async def rollout(asked: RolloutRequest, request: Request) -> dict:
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

    return router
