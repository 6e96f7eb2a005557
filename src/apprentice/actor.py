"""Who plays RL's rollouts: the policy under training, as it was at the last update."""

from typing import Protocol

import torch
from peft.tuners.lora import LoraLayer

from apprentice.local import Local
from apprentice.policy import Policy


class Actor(Protocol):
    """Takes the trainer's weights and plays with them. Its replies carry a `local.Sample`, wherever they were drawn."""

    def update(self, model, version: int) -> None:
        """Play with this PEFT model's adapter from now on. Called in every rank; version: the iteration."""

    def policy(self, temperature: float, max_tokens: int, random_seed: int) -> Policy:
        """The policy of the last update."""

    def sleep(self) -> None:
        """The trainer needs the memory."""

    def wake(self) -> None:
        """The next rollouts are about to begin."""

    def close(self) -> None:
        """There will be no more rollouts."""


class InProcess:
    """A plain model in the trainer's process, beside the one that is trained."""

    def __init__(self, model, processor):
        """model: the base model once more."""
        self.model, self.processor = model, processor

    @torch.no_grad()
    def update(self, model, version: int) -> None:
        """Merge the adapter's weights into the copy; it answers a third faster so."""
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                self.model.get_submodule(name).weight.copy_(weight + module.get_delta_weight("default"))

    def policy(self, temperature: float, max_tokens: int, random_seed: int) -> Local:
        return Local("student", self.model, self.processor, temperature, max_tokens, random_seed)

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass
