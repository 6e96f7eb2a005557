"""Does a paid teacher's run take longer than its endpoint needs? python benchmarks/collect.py [SECONDS a cell, 10]

A server in a process of its own answers each request with a noop after a fixed latency. The whole run, ledger, pictures
and trace included but without the imports before it, is measured against decisions × latency / concurrency. It takes
a core at the fastest: on a busy machine the figures say more about that.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import uvloop

ROOT = Path(__file__).parent.parent
LATENCIES = (0.1, 0.5, 2.0)
CONCURRENCIES = (1, 8, 64)


def main(seconds: float = 10.0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["APPRENTICE_CACHE"] = folder
        os.environ["TQDM_DISABLE"] = "1"
        measured(0.0, 2, 3, folder)  # imports and compiles
        print("latency  concurrency  decisions   ideal    took  ratio  CPU ms a decision")
        for latency in LATENCIES:
            for concurrency in CONCURRENCIES:
                steps = max(2, round(seconds / latency))
                took, cpu = measured(latency, concurrency, steps, folder)
                decisions, ideal = steps * concurrency, steps * latency
                print(
                    f"{latency:6.1f}s {concurrency:12} {decisions:10} {ideal:6.1f}s {took:6.1f}s {took / ideal:6.3f}"
                    f" {cpu / decisions * 1000:10.2f}",
                    flush=True,
                )


def measured(latency: float, concurrency: int, steps: int, folder: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a run with as many episodes as may be under way."""
    from apprentice import store
    from apprentice.params import Endpoint, Prompt, Teacher
    from apprentice.play import Spec
    from apprentice.players import chat

    server = subprocess.Popen([sys.executable, __file__, "serve", str(latency)], stdout=subprocess.PIPE, text=True)
    try:
        teacher = Teacher(
            policy="chat",
            seeds=list(islice(quiet(steps), concurrency)),
            max_steps=steps,
            prompt=Prompt(mode="text+image", history=4),
            endpoint=Endpoint(
                base_url=server.stdout.readline().strip(), model="m", api_key_env=None, concurrency=concurrency
            ),
        )
        spec = Spec(teacher.seeds, steps, teacher.prompt, "benchmark")
        began, cpu = time.monotonic(), time.process_time()
        store.join(Path(folder) / "trace.parquet", chat.record(spec, teacher.endpoint, "code", "benchmark"))
        return time.monotonic() - began, time.process_time() - cpu
    finally:
        server.kill()
        server.wait()


def quiet(steps: int) -> Iterator[int]:
    """Seeds of worlds in which doing nothing lives as long as that: all episodes are as long."""
    from apprentice.world import World

    for seed in count():
        world = World(seed)
        world.reset()
        if not any(world.step("noop").done for _ in range(steps)):
            yield seed


class Connection(asyncio.Protocol):
    """Answers each request a fixed time after its last byte; parses nothing, for it is not what is measured."""

    def __init__(self, latency: float, answer: bytes):
        self.latency, self.answer, self.received = latency, answer, b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        if end and len(body) == int(head.lower().partition(b"content-length:")[2].split()[0]):
            self.received = b""
            asyncio.get_running_loop().call_later(self.latency, self.transport.write, self.answer)


async def serve(latency: float) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from endpoint import NOOP

    body = json.dumps(NOOP.body).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    listening = await asyncio.get_running_loop().create_server(lambda: Connection(latency, answer), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        uvloop.run(serve(float(sys.argv[2])))
    else:
        main(*map(float, sys.argv[1:]))
