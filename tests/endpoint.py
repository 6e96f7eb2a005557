"""A real HTTP server on 127.0.0.1 that answers like OpenAI's chat API, or fails as a script says.

In a test: `with Server(script) as server`, in a thread of its own. As a process that counts requests in a file:
python tests/endpoint.py LATENCY LOG; it prints its URL.
"""

import asyncio
import json
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

ACTIONS = ("noop", "move_left", "move_right", "move_up", "move_down", "do", "sleep", "place_table")


@dataclass(frozen=True)
class Answer:
    """What is sent back, after `delay` seconds."""

    body: bytes | str | dict = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None
    """Close the connection after so many bytes of the body; 0 sends not even the head."""


def call(*actions: str, **function: Any) -> dict:
    """A message that calls act; a name or arguments may be given instead of the right ones."""
    function = {"name": "act", "arguments": json.dumps({"actions": actions})} | function
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }


def completion(message: dict, finish_reason: str = "tool_calls", prompt_tokens: int = 100, completion_tokens: int = 10):
    """The JSON of a whole answer."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "served",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


NOOP = Answer(completion(call("noop")))


def playing(body: dict, delay: float = 0.0) -> Answer:
    """Play on: an action that depends on nothing but what is shown."""
    return Answer(
        completion(call(ACTIONS[zlib.crc32(json.dumps(body["messages"]).encode()) % len(ACTIONS)])), delay=delay
    )


@dataclass
class Request:
    """A request as it came; when it came and was answered is time.monotonic()."""

    body: dict
    headers: dict[str, str]
    began: float
    ended: float = float("inf")
    number: int = 0


class Server:
    """script: answers in turn, then for ever the last; or a function of the request."""

    def __init__(self, script: Iterable[Answer] | Callable[[Request], Answer] = (NOOP,)):
        if callable(script):
            self.answer = script
        else:
            script = list(script)
            answers = chain(script, repeat(script[-1]))
            self.answer = lambda request: next(answers)
        self.requests: list[Request] = []
        self.ended: Callable[[Request], None] = lambda request: None
        self.most_at_once = self._open = 0

    def __enter__(self) -> "Server":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *exception) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def listen(self, port: int = 0) -> None:
        server = asyncio.run_coroutine_threadsafe(self.start(port), self._loop).result()
        self._server = server

    def close(self) -> None:
        """Refuse connections, and break those there are."""

        async def close():
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()

    async def start(self, port: int = 0) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:]) if name}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or "{}")
        request = Request(body, headers, time.monotonic(), number=len(self.requests))
        self.requests.append(request)
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        try:
            answer = self.answer(request)
            if answer.delay:
                await asyncio.sleep(answer.delay)
        finally:
            self._open -= 1
        content = answer.body
        if isinstance(content, dict):
            content = json.dumps(content)
        if isinstance(content, str):
            content = content.encode()
        if answer.cut == 0:
            return False
        sent = {"Content-Type": "application/json", "Content-Length": str(len(content))} | answer.headers
        lines = [f"HTTP/1.1 {answer.status} It"]
        lines += [f"{name}: {value}" for name, value in sent.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content[: answer.cut])
        await writer.drain()
        request.ended = time.monotonic()
        self.ended(request)
        return answer.cut is None


async def serve(latency: float, log: str) -> None:
    """Play on after the latency, and write a line for each request that begins or ends, with the time."""
    with open(log, "a", buffering=1) as lines:

        def begun(request: Request) -> Answer:
            lines.write(f"begun {request.number} {request.began}\n")
            return playing(request.body, latency)

        server = Server(begun)
        server.ended = lambda request: lines.write(f"ended {request.number} {request.ended}\n")
        listening = await server.start()
        print(server.url, flush=True)
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1]), sys.argv[2]))
