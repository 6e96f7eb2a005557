"""A vLLM server for machines without one: its addresses and answers, with this package's own engine behind them.

    python tests/serving/stand_in.py serve models/base --port 8000 ...      the flags of the real program

It reads adapters from folders, sleeps and wakes, and answers those who ask at the same time together.
"""

import argparse
import asyncio
import logging
from collections import defaultdict

import numpy as np
import torch
from aiohttp import web
from peft import PeftModel

from apprentice.serving.in_process import generate
from apprentice.student import loading
from apprentice.student.encoding import encode

TOGETHER = 0.02
"""Seconds in which those who ask are answered together."""


class Engine:
    def __init__(self, base: str, dtype: str):
        self.base, self.dtype, self.folders = base, dtype, {}
        self.models = {"base": loading.load(base, dtype=dtype)[0]}
        self.processor = loading.processor(base)
        self.waiting: list[tuple[dict, asyncio.Future]] = []
        self.asleep = False

    def load(self, name: str, folder: str) -> None:
        model = PeftModel.from_pretrained(loading.load(self.base, dtype=self.dtype)[0], folder)
        self.models[name], self.folders[name] = model.merge_and_unload().eval(), folder

    async def answer(self, body: dict) -> dict:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((body, future))
        asyncio.get_running_loop().call_later(TOGETHER, self.flush)
        return await future

    def flush(self) -> None:
        waiting, self.waiting = self.waiting, []
        alike = defaultdict(list)
        for body, future in waiting:
            alike[body["model"], body["temperature"], body["max_tokens"]].append((body, future))
        for (model, temperature, most), asked in alike.items():
            for start in range(0, len(asked), 16):
                self.generate(self.models[model], temperature, most, asked[start : start + 16])

    def generate(self, model, temperature: float, most: int, asked: list[tuple[dict, asyncio.Future]]) -> None:
        rows = [encode(self.processor, body["messages"]) for body, _ in asked]
        draws = np.stack([np.random.default_rng(body.get("seed", 0)).random(most) for body, _ in asked])
        answers = generate(model, self.processor, rows, draws, temperature)
        for row, (_, future), (ids, logprobs, *_) in zip(rows, asked, answers, strict=True):
            ended = ids[-1] == self.processor.tokenizer.eos_token_id
            choice = {
                "message": {"role": "assistant", "content": self.processor.tokenizer.decode(ids)},
                "finish_reason": "stop" if ended else "length",
                "token_ids": ids,
                "logprobs": {"content": [{"logprob": value} for value in logprobs]},
            }
            future.set_result({"choices": [choice], "prompt_token_ids": row.prompt_ids})


def application(engine: Engine) -> web.Application:
    routes = web.RouteTableDef()

    @routes.get("/health")
    async def health(_):
        return web.Response()

    @routes.get("/v1/models")
    async def models(_):
        found = [{"id": name, "parent": None if name == "base" else "base"} for name in engine.models]
        return web.json_response({"data": found})

    @routes.post("/v1/load_lora_adapter")
    async def load(request):
        body = await request.json()
        engine.load(body["lora_name"], body["lora_path"])
        return web.Response()

    @routes.post("/v1/unload_lora_adapter")
    async def unload(request):
        del engine.models[(await request.json())["lora_name"]]
        return web.Response()

    @routes.post("/reset_prefix_cache")
    async def reset(_):
        return web.Response()

    @routes.post("/sleep")
    async def sleep(_):
        engine.asleep = True
        return web.Response()

    @routes.post("/wake_up")
    async def wake(_):
        engine.asleep = False
        return web.Response()

    @routes.get("/is_sleeping")
    async def sleeping(_):
        return web.json_response({"is_sleeping": engine.asleep})

    @routes.post("/v1/chat/completions")
    async def complete(request):
        body = await request.json()
        if engine.asleep:
            return web.Response(status=500, text="it sleeps")
        if body["model"] not in engine.models:
            return web.Response(status=404, text=f"no model {body['model']}")
        return web.json_response(await engine.answer(body))

    made = web.Application(client_max_size=1 << 30)
    made.add_routes(routes)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("base")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--dtype")
    asked, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    web.run_app(application(Engine(asked.base, asked.dtype)), host=asked.host, port=asked.port)


if __name__ == "__main__":
    main()
