"""OpenEnv's MCP endpoint, POST /mcp: the tool `act` of the prompt, called in a session that its /ws resets.

JSON-RPC 2.0 with the methods of openenv 0.10.0: openenv/session/create and close, tools/list and tools/call, the
session's name among the params. As OpenEnv has it, no tool resets: that's the trainer's, not the player's.
"""

import json
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from apprentice import prompt
from apprentice.environment.messages import Busy, NoSuchSession, Wrong
from apprentice.environment.sessions import Sessions

TOOLS = [
    {"name": tool["name"], "description": tool["description"], "inputSchema": tool["parameters"]}
    for tool in (tool["function"] for tool in prompt.TOOLS)
]
_PARSE, _REQUEST, _METHOD, _PARAMS, _SERVER = -32700, -32600, -32601, -32602, -32000
"""JSON-RPC's codes of errors; the last is for a server's own."""


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    jsonrpc: Literal["2.0"]
    method: str
    params: dict[str, Any] = {}
    id: str | int | None = None


def routes(sessions: Sessions) -> APIRouter:
    router = APIRouter()

    @router.post("/mcp")
    async def mcp(request: Request) -> dict:
        try:
            asked = _Asked.model_validate(json.loads(await request.body()))
        except ValidationError as error:
            first = error.errors()[0]
            return _error(None, _REQUEST, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        except (ValueError, RecursionError):
            return _error(None, _PARSE, "the body is not JSON")
        try:
            return {"jsonrpc": "2.0", "id": asked.id, "result": await _result(asked, sessions)}
        except Busy as error:
            return _error(asked.id, _SERVER, str(error))
        except NoSuchSession as error:
            return _error(asked.id, _PARAMS, f"session_id: {error}")
        except LookupError as error:
            return _error(asked.id, _METHOD, str(error))

    return router


async def _result(asked: _Asked, sessions: Sessions) -> dict:
    """Raises Busy, NoSuchSession, and LookupError for a method that there is not."""
    name = str(asked.params.get("session_id"))
    match asked.method:
        case "openenv/session/create":
            return {"session_id": sessions.begin()[0]}
        case "openenv/session/close":
            sessions.named(name)
            sessions.end(name)
            return {"session_id": name, "closed": True}
        case "tools/list":
            return {"tools": TOOLS}
        case "tools/call":
            session = sessions.named(name)
            call = {"name": asked.params.get("name"), "arguments": asked.params.get("arguments")}
            read = prompt.parse({"tool_calls": [{"function": call}]})
            if read.invalid:
                return _said(read.invalid)
            try:
                found = await sessions.call(session, session.act, read.actions)
            except Wrong as error:
                return _said(str(error))
            image = {"type": "image", "data": found["observation"].pop("image"), "mimeType": "image/png"}
            text = {"type": "text", "text": found["observation"]["text"]}
            return {"content": [text, image], "structuredContent": found, "isError": False}
    raise LookupError(
        f"there is no method {asked.method!r}; there are openenv/session/create and close, tools/list and call"
    )


def _said(why: str) -> dict:
    """A call that the player got wrong, for it to read: MCP's form, which is no error of the protocol."""
    return {"content": [{"type": "text", "text": why}], "isError": True}


def _error(name: str | int | None, code: int, message: str) -> dict:
    return {"jsonrpc": "2.0", "id": name, "error": {"code": code, "message": message}}
