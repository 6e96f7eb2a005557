"""Who plays RL's rollouts: the policy under training, as it was at the last update."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from apprentice.policy import Policy
from apprentice.serving.in_process import InProcess
from apprentice.serving.on_vllm import OnVllm
from apprentice.serving.vllm import Adapter, Server
from apprentice.student.narrowing import narrow

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor


class Sampler(Protocol):
    """Takes the trainer's weights and plays with them. Its replies carry an `episode.Sampled`, wherever drawn."""

    exact: bool
    """Its log-probabilities are the trainer's own, but for the rounding of float32."""
    apart: bool
    """It can play while the trainer works."""

    def update(self, model: PeftModel, version: int) -> None:
        """Play with this PEFT model's adapter from now on. Called in every rank; version: the iteration."""

    def policy(self, temperature: float, max_tokens: int, random_seed: int) -> Policy:
        """The policy of the last update."""

    def sleep(self) -> None:
        """The trainer needs the memory."""

    def wake(self) -> None:
        """The next rollouts are about to begin."""

    def close(self) -> None:
        """There will be no more rollouts."""


class InProcessSampler:
    """A plain model in the trainer's process, beside the one that is trained."""

    apart = False

    def __init__(self, model: "Qwen3VLForConditionalGeneration", processor: "Qwen3VLProcessor"):
        """model: the base model once more."""
        self.model, self.processor = model, processor
        self.exact = model.dtype == torch.float32
        narrow(model)

    @torch.no_grad()
    def update(self, model: PeftModel, version: int) -> None:
        """Merge the adapter's weights into the copy; it answers a third faster so."""
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                self.model.get_submodule(name).weight.copy_(weight + module.get_delta_weight("default"))

    def policy(self, temperature: float, max_tokens: int, random_seed: int) -> InProcess:
        return InProcess("student", self.model, self.processor, temperature, max_tokens, random_seed)

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


class VllmSampler:
    """vLLM servers, which all ranks use. An update is an adapter in a folder of its own, under a name of its own."""

    exact = False

    def __init__(self, servers: Sequence[Server], processor: "Qwen3VLProcessor", folder: Path, sleeps: bool = False):
        """folder: for the adapters; the servers have to be able to read it. sleeps: servers and trainer share GPUs."""
        self.servers, self.processor, self.folder, self.sleeps = servers, processor, folder, sleeps
        self._adapter: Adapter | None = None
        self.apart = not sleeps
        self._state = PartialState()
        self._asleep = False

    def update(self, model: PeftModel, version: int) -> None:
        self._state.wait_for_everyone()  # from here on, no rank plays with the adapter before
        folder = self.folder / str(version)
        if self._state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(folder, selected_adapters=["default"])
            loaded = Adapter.of(folder)
            for server in self.servers:
                server.ready(loaded)
                if self._adapter and self._adapter.name != loaded.name:
                    server.unload(self._adapter.name)
        self._state.wait_for_everyone()
        before, self._adapter = self._adapter, Adapter.of(folder)
        if self._state.is_main_process and before and before.folder != self._adapter.folder:
            shutil.rmtree(before.folder, ignore_errors=True)

    def policy(self, temperature: float, max_tokens: int, random_seed: int) -> OnVllm:
        return OnVllm("student", self.servers, self._adapter, self.processor, temperature, max_tokens, random_seed)

    def sleep(self) -> None:
        self._state.wait_for_everyone()  # others may still play
        if self.sleeps and self._state.is_main_process:
            for server in self.servers:
                server.sleep()
        self._asleep = self.sleeps
        self._state.wait_for_everyone()

    def wake(self) -> None:
        if not self._asleep:
            return
        torch.cuda.empty_cache()
        self._state.wait_for_everyone()
        if self._state.is_main_process:
            for server in self.servers:
                server.wake()
        self._asleep = False
        self._state.wait_for_everyone()

    def close(self) -> None:
        if self._state.is_main_process and self._adapter:
            self.wake()
            for server in self.servers:
                server.unload(self._adapter.name)
