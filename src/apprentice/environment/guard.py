"""Who may ask, and how much: what stands before a server, whatever it serves."""

import base64
import binascii
import secrets
from ipaddress import ip_address

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Guard:
    """Before anything else: the key, the size of the body, and no strange web page's script.

    key: what every request but /health must bring; None for none. body: bytes that a request's may have.

    Without a key the server listens to this machine only; a browser on it could still be made to send requests, by
    another site's page or by a name that points here, so those with an Origin or another Host are turned away.
    """

    def __init__(self, app: ASGIApp, key: str | None, body: int):
        self.app, self.key, self.body = app, key and key.encode(), body

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
        too_long = f"a body may have {self.body} bytes"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.body:
            return await self._refuse(scope, receive, send, 413, too_long)
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            if message["type"] == "http.request":
                got += len(message.get("body", b""))
                if got > self.body:
                    raise HTTPException(413, too_long)
            return message

        await self.app(scope, counted, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, status: int, why: str) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": why})  # before it's accepted: HTTP 403
            return
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        await JSONResponse({"detail": why}, status, headers)(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it: an address, or localhost; no other name is looked up."""
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _local(host: str) -> bool:
    """The same of a header Host, which may have a port."""
    return is_loopback(host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host)


def _knows(authorization: bytes, key: bytes) -> bool:
    """The key as a bearer's, or as the password of a URL: older OpenEnv clients can send no header."""
    kind, _, given = authorization.partition(b" ")
    if kind.lower() == b"basic":
        try:
            given = base64.b64decode(given).partition(b":")[2]
        except binascii.Error:
            return False
    return secrets.compare_digest(given.strip(), key)
