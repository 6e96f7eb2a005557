"""The student behind vLLM, as a policy: an episode asks on its own and waits for nobody."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import numpy as np

from apprentice import prompt
from apprentice.episode import Reply
from apprentice.errors import WorkError
from apprentice.policy import Turn
from apprentice.serving.in_process import Sample, as_reply, vision_tokens
from apprentice.serving.vllm import Adapter, Server
from apprentice.student import loading
from apprentice.student.encoding import Encoded

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

_TIMEOUT = 600.0
"""Seconds to wait for one reply."""


class OnVllm:
    """A model of vLLM servers as a policy. An episode stays with one of them, which knows its prefixes.

    Each request brings its own seed, from random_seed, the world's seed, how often that has begun before, and the turn.
    A server that does not answer is waited for, and asked again when its guard has started it anew.
    """

    def __init__(
        self,
        name: str,
        servers: Sequence[Server],
        adapter: Adapter | None,
        processor: "Qwen3VLProcessor",
        temperature: float,
        max_tokens: int,
        random_seed: int = 0,
    ):
        """adapter: None plays the base model."""
        self.name, self.servers, self.adapter, self.processor = name, servers, adapter, processor
        self.random_seed = random_seed
        self._body = {
            "model": adapter.name if adapter else "base",
            "tools": prompt.TOOLS,
            "tool_choice": "none",  # the tools are shown all the same; the reply is read here, from its tokens
            "temperature": temperature,
            "max_tokens": max_tokens,
            # Nothing of the model's own generation_config.json, and no token of a picture.
            **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
            "logit_bias": {str(token): -100 for token in vision_tokens(processor)},
            "stop_token_ids": [processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id],
            **{"return_token_ids": True, "logprobs": True, "top_logprobs": 0},
        }
        self._begun: Counter[int] = Counter()
        self._alive = 0
        self._session: aiohttp.ClientSession | None = None

    def begin(self, seed: int) -> "_VllmPlayer":
        member = self._begun[seed]
        self._begun[seed] += 1
        server = self.servers[self._begun.total() % len(self.servers)]  # in turn
        self._alive += 1
        return _VllmPlayer(self, server, np.random.default_rng([self.random_seed, seed, member]))

    async def ask(self, server: Server, body: dict) -> dict:
        """The server's answer. Raises WorkError when there is none and will be none."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_TIMEOUT)
            )
        for _ in range(3):
            try:
                async with self._session.post(f"{server.url}/v1/chat/completions", json=self._body | body) as response:
                    if response.status == 200:
                        return await response.json()
                    said = " ".join((await response.text()).split())[:300]
            except (aiohttp.ClientError, TimeoutError) as error:
                said = f"{type(error).__name__} {error}"
            else:
                # It does not know an adapter that it was never told of, or not since it was started again.
                if response.status < 500 and response.status != 404:
                    raise WorkError(f"{server.url} refuses a request (HTTP {response.status}): {said}")
            await asyncio.to_thread(server.ready, self.adapter)
        raise WorkError(f"{server.url} does not answer: {said}{server.last_words()}")

    def _end(self) -> None:
        self._alive -= 1
        if not self._alive and self._session:
            self._closing = asyncio.get_running_loop().create_task(self._session.close())
            self._session = None


class _VllmPlayer:
    def __init__(self, policy: OnVllm, server: Server, generator: np.random.Generator):
        self.policy, self.server, self.generator = policy, server, generator

    async def reply(self, turn: Turn) -> Reply:
        policy = self.policy
        request = {"messages": turn.messages, "seed": int(self.generator.integers(2**63))}
        answer = await policy.ask(self.server, request)
        choice, prompt_ids = answer["choices"][0], answer["prompt_token_ids"]
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        # The tokens that the server has read and drawn. Pixels are computed for those decisions that are trained on.
        sample = Sample(Encoded(prompt_ids, choice["token_ids"], None, None), logprobs)
        return as_reply(policy.name, policy.processor, len(prompt_ids), choice["token_ids"], sample)

    def end(self) -> None:
        self.policy._end()


def load(
    name: str, servers: tuple[Server, ...], adapter: str | None, temperature: float, max_tokens: int, base: str
) -> OnVllm:
    """The student on these servers as a policy; base: the folder of the model that they serve."""
    named = Adapter.of(Path(adapter)) if adapter else None
    return OnVllm(name, servers, named, loading.processor(base), temperature, max_tokens)
