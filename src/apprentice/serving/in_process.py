"""The student in this process: a Policy that answers all waiting episodes with one batched generation."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from apprentice import prompt
from apprentice.episode import Reply
from apprentice.policy import Turn
from apprentice.student import loading
from apprentice.student.encoding import Encoded, batch, encode_all
from apprentice.student.narrowing import narrow

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor


@dataclass(frozen=True)
class Sample:
    """A reply as it was sampled; what RL trains on."""

    encoded: Encoded
    logprobs: list[float]
    """Log-probability of each token of the answer, at the sampling temperature."""
    hidden: np.ndarray | None = None
    """float32: the last hidden state before the answer; None from an engine that doesn't show it."""


class InProcess:
    """A transformers model, any adapter merged, as a policy.

    Requests wait until every episode under way has one; then they are answered together. The draws depend on
    random_seed, the world's seed, how often that seed has begun before, and the turn: not on who else is playing.
    """

    def __init__(
        self,
        name: str,
        model: "Qwen3VLForConditionalGeneration",
        processor: "Qwen3VLProcessor",
        temperature: float,
        max_tokens: int,
        random_seed: int = 0,
    ):
        self.name, self.model, self.processor = name, model, processor
        self.temperature, self.max_tokens, self.random_seed = temperature, max_tokens, random_seed
        self._alive = 0
        self._begun: Counter[int] = Counter()
        self._waiting: list[tuple[Turn, np.random.Generator, asyncio.Future]] = []

    def begin(self, seed: int) -> "_InProcessPlayer":
        member = self._begun[seed]
        self._begun[seed] += 1
        self._alive += 1
        return _InProcessPlayer(self, np.random.default_rng([self.random_seed, seed, member]))

    def _flush(self) -> None:
        if not self._waiting or len(self._waiting) < self._alive:
            return
        waiting, self._waiting = self._waiting, []
        try:
            rows = shown(self.processor, [turn for turn, _, _ in waiting])
            draws = np.stack([generator.random(self.max_tokens) for _, generator, _ in waiting])
            answers = generate(self.model, self.processor, rows, draws, self.temperature)
        except BaseException as error:
            for _, _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, _, future), row, answer in zip(waiting, rows, answers, strict=True):
            if not future.done():
                ids, logprobs, hidden = answer
                encoded = Encoded(row.prompt_ids, ids, row.pixel_values, row.image_grid_thw)
                sample = Sample(encoded, logprobs, hidden)
                future.set_result(as_reply(self.name, self.processor, len(row.prompt_ids), ids, sample))


def as_reply(name: str, processor: "Qwen3VLProcessor", prompt_tokens: int, ids: list[int], sample: Sample) -> Reply:
    """A reply from the tokens of its answer."""
    ended = ids[-1] == processor.tokenizer.eos_token_id
    text = processor.tokenizer.decode(ids[:-1] if ended else ids)
    message = {"role": "assistant", "content": text}
    return Reply(message, "stop" if ended else "length", name, prompt_tokens, len(ids), sample)


def shown(processor: "Qwen3VLProcessor", turns: Sequence[Turn]) -> list[Encoded]:
    """What the student is given at these turns: its pictures are taken as they are, and not by way of a PNG."""
    chats = [prompt.messages(turn.observation, turn.settings, turn.history, inline=False) for turn in turns]
    return encode_all(processor, chats, [prompt.pictures(turn.observation, turn.settings) for turn in turns])


def load(
    name: str,
    adapter: str | None,
    dtype: str,
    temperature: float,
    max_tokens: int,
    threads: int,
    base: str = "models/base",
) -> InProcess:
    """The student as a policy, from its folders."""
    torch.set_num_threads(threads)
    model, processor = loading.load(base, adapter, dtype)
    if adapter:
        model = model.merge_and_unload()  # answers a third faster
    narrow(model)
    return InProcess(name, model, processor, temperature, max_tokens)


class _InProcessPlayer:
    def __init__(self, policy: InProcess, generator: np.random.Generator):
        self.policy, self.generator = policy, generator

    async def reply(self, turn: Turn) -> Reply:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.policy._waiting.append((turn, self.generator, future))
        # Not now: episodes that are ready to go on have to be heard first, or each would be answered alone.
        loop.call_soon(self.policy._flush)
        return await future

    def end(self) -> None:
        self.policy._alive -= 1
        self.policy._flush()


def vision_tokens(processor: "Qwen3VLProcessor") -> list[int]:
    """Tokens that stand for pictures: a model that says one would break its next turn, so none is ever sampled."""
    names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    return processor.tokenizer.convert_tokens_to_ids(list(names))


@torch.inference_mode()
def generate(
    model: "Qwen3VLForConditionalGeneration",
    processor: "Qwen3VLProcessor",
    rows: list[Encoded],
    draws: np.ndarray,
    temperature: float,
) -> list[tuple[list[int], list[float], np.ndarray]]:
    """Sample an answer for each prompt: its token ids, their log-probabilities, and the last hidden state before it.

    draws: (rows, most tokens) uniform numbers in [0, 1), one for each token to draw; temperature 0 takes the likeliest.
    An answer ends with the end-of-turn token, or unended when draws run out.
    """
    inputs = batch(processor, rows).copy()
    del inputs["labels"]
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    ends = torch.tensor([processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id], device=model.device)
    banned = vision_tokens(processor)
    draws = torch.tensor(draws, device=model.device)
    mask = inputs["attention_mask"]
    tokens, logprobs = [], []
    running = torch.ones(len(rows), dtype=torch.bool, device=model.device)
    states: list[torch.Tensor] = []
    hook = model.model.register_forward_hook(lambda *called: states.append(called[-1].last_hidden_state[:, -1]))
    try:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        hook.remove()
    hidden = states[0].float().cpu().numpy()
    positions = mask.sum(dim=1, keepdim=True)
    if "pixel_values" in inputs:  # without, the model would still have the shifts of its last pictures
        positions = positions + model.model.rope_deltas.view(-1, 1)
    for turn in range(draws.shape[1]):
        logits = output.logits[:, -1].double()
        logits[:, banned] = -torch.inf
        scores = (logits / (temperature or 1.0)).log_softmax(dim=-1)
        if temperature:
            cumulative = scores.exp().cumsum(dim=-1)
            token = torch.searchsorted(cumulative, draws[:, turn, None] * cumulative[:, -1:], right=True)
            token = token.clamp(max=scores.shape[1] - 1)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        tokens.append(token.where(running[:, None], ends[1]))
        logprobs.append(scores.gather(1, token))
        running = running & ~torch.isin(token[:, 0], ends)
        if turn + 1 == draws.shape[1] or not running.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        output = model(
            input_ids=tokens[-1],
            attention_mask=mask,
            position_ids=positions.expand(3, -1, -1),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        positions = positions + 1
    ids, chances = torch.cat(tokens, dim=1).tolist(), torch.cat(logprobs, dim=1).tolist()
    stops = set(ends.tolist())
    answers = []
    for row_ids, row_chances, state in zip(ids, chances, hidden, strict=True):
        length = next((index + 1 for index, token in enumerate(row_ids) if token in stops), len(row_ids))
        answers.append((row_ids[:length], row_chances[:length], state))
    return answers
