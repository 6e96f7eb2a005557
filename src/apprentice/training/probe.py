"""Whether the servers play the policy that is trained: the probabilities of some replies, there and here.

A server can be wrong and answer all the same. It ignores the adapter's part in the vision tower if it was started
without --enable-tower-connector-lora. It has dropped adapters in its sleep (vLLM issue 53888). Its engine, the model it
has or its chat template may be others than the trainer's. All of it shows in the log-probabilities.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from apprentice.episode import Reply
from apprentice.params import Prompt
from apprentice.policy import Policy, Turn
from apprentice.serving.in_process import shown, vision_tokens
from apprentice.student.encoding import Encoded, batch
from apprentice.training.rollouts import with_answers
from apprentice.world.world import World

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

TURNS = 8
"""Decisions asked for: the first ones of as many worlds."""
_ROUNDING = 1e-3
"""Nats a token. Policies that are nearer to each other than this are not told apart."""
_PARTS = {"the base model without the adapter": "", "the adapter without its part in the vision tower": "visual"}
"""What a server may play instead, and the layers whose adapter is then without effect."""


class Probe:
    """The first decisions of some worlds, which servers are asked for and whose probabilities the trainer knows."""

    def __init__(self, seeds: Sequence[int], shown_with: Prompt, temperature: float, bound: float):
        """bound: how far log-probabilities may be apart, nats a token."""
        worlds = [World(seed, max_steps=1) for seed in seeds[:TURNS]]
        self.turns = [Turn(world.reset(), (), shown_with) for world in worlds]
        self.temperature, self.bound = temperature, bound

    def doubt(self, policy: Policy, model: PeftModel, processor: "Qwen3VLProcessor") -> str | None:
        """Why these replies cannot be those of the trainer's model with its adapter; None if they can.

        Raises WorkError if the server was shown other prompts.
        """
        samples = [sample for reply in asyncio.run(_asked(policy, self.turns)) if (sample := reply.sample)]
        rows = with_answers(shown(processor, self.turns), [sample.encoded for sample in samples])
        served = np.concatenate([sample.logprobs for sample in samples])

        def apart() -> float:
            return float(np.abs(logprobs(model, processor, rows, self.temperature) - served).mean())

        whole = apart()
        for instead, layers in _PARTS.items():
            with _without(model, layers):
                # By far the nearer one: noise moves the server as far from both.
                if whole > _ROUNDING and apart() < whole / 2:
                    return f"it plays {instead}"
        if whole > self.bound:
            return (
                f"its log-probabilities are {whole:.2g} nats a token from the trainer's, and "
                f"max_sampler_mismatch is {self.bound:g}"
            )
        return None


async def _asked(policy: Policy, turns: Sequence[Turn]) -> list[Reply]:
    """The policy's replies, all asked at once."""
    players = [policy.begin(seed) for seed in range(len(turns))]
    try:
        return await asyncio.gather(*(player.reply(turn) for player, turn in zip(players, turns, strict=True)))
    finally:
        for player in players:
            player.end()


@torch.no_grad()
def logprobs(
    model: PeftModel, processor: "Qwen3VLProcessor", rows: Sequence[Encoded], temperature: float
) -> np.ndarray:
    """(tokens of all answers) the model's log-probabilities of them, as it would be sampled from."""
    inputs = {name: value.to(model.device) for name, value in batch(processor, rows).items()}
    longest = max(len(row.answer_ids) for row in rows)
    answers = inputs.pop("labels")[:, -longest:]
    logits = model(**inputs, logits_to_keep=longest + 1).logits[:, -longest - 1 : -1].float()
    logits[..., vision_tokens(processor)] = -torch.inf
    scores = (logits / temperature).log_softmax(dim=-1)
    said = answers != -100
    return scores.gather(-1, answers.clamp(min=0)[..., None])[..., 0][said].cpu().numpy()


@contextmanager
def _without(model: PeftModel, part: str) -> Iterator[None]:
    """The adapter has no effect in layers with this in their name."""
    layers = [layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and part in name]
    kept = [layer.scaling["default"] for layer in layers]
    for layer in layers:
        layer.scaling["default"] = 0.0
    try:
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling["default"] = scaling
