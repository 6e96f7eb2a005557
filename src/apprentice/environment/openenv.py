"""OpenEnv's protocol (https://github.com/huggingface/OpenEnv, openenv 0.10.0): a session for each WebSocket at /ws.

Ours, and not the library's `HTTPEnvServer`, which was tried with a small `Environment`, two sessions at most, each idle
for two seconds at most:

- It needs gradio, which needs Pillow < 13, and requirements.lock has 13: it can't be installed beside the rest. Its own
  environment has 477 MB, and to import it takes 4 s and 160 MB.
- A session that's idle for too long has its environment closed, but the socket isn't told, plays on, and counts no
  more: beside two idle ones two others began, and all could play.
- A binary frame, a JSON list and deep nesting each end the session, with `'text'` or `'list' object has no attribute
  'get'` as the reason. Of a wrong action its message says only "Invalid message"; what's wrong stands in a field that
  its client drops. What comes with a reset is not checked; an argument of an unknown name is dropped in silence.
- By plain HTTP each request gets a world of its own, so that POST /step moves one that nobody began.
- It has no key, no look at Origin or Host, and no limit of a body: 10 MB came back whole, in the error about them.
"""

import asyncio
import time
from importlib.metadata import version

from fastapi import APIRouter, WebSocket
from pydantic import ValidationError
from starlette.websockets import WebSocketDisconnect, WebSocketState

from apprentice.environment.messages import (
    ActionBody,
    Busy,
    NoSuchSession,
    ObservationBody,
    ResetRequest,
    StateBody,
    Wrong,
)
from apprentice.environment.sessions import Session, Sessions


def routes(sessions: Sessions) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict:
        return {"status": "healthy"}

    @router.get("/metadata")
    async def metadata() -> dict:
        return {
            "name": "crafter",
            "description": "Crafter, deterministic: the same seed and actions give the same bytes. Send one of the "
            "17 actions a step; the reward is +1 for each achievement unlocked and 0.1 for a health point.",
            "version": version("apprentice"),
        }

    @router.get("/schema")
    async def schema() -> dict:
        bodies = {"action": ActionBody, "observation": ObservationBody, "state": StateBody}
        return {name: body.model_json_schema() for name, body in bodies.items()}

    @router.websocket("/ws")
    async def hold(socket: WebSocket) -> None:
        await socket.accept()
        begun = socket.query_params.get("session_id")  # by /mcp, which plays in it too, and ends it
        try:
            name, session = (begun, sessions.named(begun)) if begun else sessions.begin()
        except Busy as error:
            await socket.send_json(_error("CAPACITY_REACHED", str(error)))
            return await socket.close(1013)
        except NoSuchSession as error:
            await socket.send_json(_error("SESSION_ERROR", str(error)))
            return await socket.close(1008)
        try:
            await _converse(socket, sessions, session)
        except (WebSocketDisconnect, RuntimeError):
            if socket.client_state == socket.application_state == WebSocketState.CONNECTED:
                raise
        finally:
            if not begun:
                sessions.end(name)

    return router


async def _converse(socket: WebSocket, sessions: Sessions, session: Session) -> None:
    """Answer message by message until it's closed or idle. A wrong message is answered too, and the session goes on."""
    while True:
        try:
            message = await asyncio.wait_for(socket.receive_json(), sessions.idle)
        except TimeoutError:
            if time.monotonic() - session.seen < sessions.idle:  # it was asked by /mcp
                continue
            await socket.send_json(_error("SESSION_ERROR", f"idle for {sessions.idle:g} s: the session is over"))
            return await socket.close(1000)
        except (ValueError, KeyError, RecursionError):
            await socket.send_json(_error("INVALID_JSON", "a message must be JSON in a text frame"))
            continue
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "close":
            return await socket.close()
        await socket.send_json(await _answer(kind, message, sessions, session))


async def _answer(kind: object, message: dict, sessions: Sessions, session: Session) -> dict:
    try:
        match kind:
            case "reset":
                asked = ResetRequest.model_validate(message.get("data", {}))
                return {"type": "observation", "data": await sessions.call(session, session.reset, asked)}
            case "step":
                step = ActionBody.model_validate(message.get("data", {}))
                return {"type": "observation", "data": await sessions.call(session, session.step, step.action)}
            case "state":
                return {"type": "state", "data": session.state}
            case _:
                return _error("UNKNOWN_TYPE", "type must be reset, step, state or close")
    except ValidationError as error:
        places = [(".".join(map(str, place["loc"])) or kind, place["msg"]) for place in error.errors()]
        return _error("VALIDATION_ERROR", "; ".join(f"{place}: {why}" for place, why in places))
    except Wrong as error:
        return _error("EXECUTION_ERROR", str(error))


def _error(code: str, message: str) -> dict:
    return {"type": "error", "data": {"message": message, "code": code}}
