"""Who plays RL's rollouts: the policy under training, as it was at the last update."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from apprentice.errors import WorkError
from apprentice.params import Profile
from apprentice.policy import Policy
from apprentice.serving.in_process import InProcess
from apprentice.serving.on_vllm import OnVllm
from apprentice.serving.vllm import Adapter, Server
from apprentice.student import loading
from apprentice.student.narrowing import narrow
from apprentice.training import devices
from apprentice.training.probe import Probe

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor


class Sampler(Protocol):
    """Takes the trainer's weights and plays with them. Its replies carry an `episode.Sampled`, wherever drawn."""

    apart: bool
    """It can play while the trainer works."""
    shows_hidden: bool
    """Its replies come with the hidden state that they were drawn from."""

    def update(self, model: PeftModel, version: int) -> None:
        """Play with this PEFT model's adapter from now on. Called in every rank; version: the iteration."""

    def policy(self, temperature: float, max_tokens: int, random_seed: int, place: int) -> Policy:
        """The policy of the last update, for the episode at this place among those played."""

    def sleep(self) -> None:
        """The trainer needs the memory."""

    def wake(self) -> None:
        """The next rollouts are about to begin."""

    def close(self) -> None:
        """There will be no more rollouts."""


class InProcessSampler:
    """A plain model in the trainer's process, beside the one that is trained."""

    apart, shows_hidden = False, True

    def __init__(self, model: "Qwen3VLForConditionalGeneration", processor: "Qwen3VLProcessor"):
        """model: the base model once more, whole where the one that is trained is quantized."""
        self.model, self.processor = model, processor
        self._whole: dict[str, torch.Tensor] = {}
        narrow(model)

    @torch.no_grad()
    def update(self, model: PeftModel, version: int) -> None:
        """Merge the adapter's weights into the copy; it answers a third faster so."""
        quantized = getattr(model.get_base_model(), "is_loaded_in_4bit", False)
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                mine, weight = self.model.get_parameter(f"{name}.weight"), module.get_base_layer().weight
                if quantized:
                    weight = self._whole.setdefault(name, mine.clone())
                mine.copy_(weight + module.get_delta_weight("default"))

    def policy(self, temperature: float, max_tokens: int, random_seed: int, place: int) -> InProcess:
        return InProcess("student", self.model, self.processor, temperature, max_tokens, random_seed)

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


class VllmSampler:
    """vLLM servers, which all ranks use. An update is an adapter in a folder of its own, under a name of its own."""

    shows_hidden = False

    def __init__(
        self,
        servers: Sequence[Server],
        processor: "Qwen3VLProcessor",
        folder: Path,
        probe: Probe,
        max_tokens: int,
        sleeps: bool = False,
    ):
        """folder: for the adapters; the servers have to be able to read it. probe: what they are tested with, before
        they play, with replies of max_tokens at most. sleeps: servers and trainer share GPUs."""
        self.servers, self.processor, self.folder, self.sleeps = tuple(servers), processor, folder, sleeps
        self.probe, self.max_tokens = probe, max_tokens
        self._adapter: Adapter | None = None
        self.apart = not sleeps
        self._first = PartialState().is_main_process
        self._asleep = False

    def update(self, model: PeftModel, version: int) -> None:
        """Raises WorkError when a server does not play what it was given."""
        devices.wait()  # from here on, no rank plays with the adapter before
        folder = self.folder / str(version)
        if self._first:
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(folder, selected_adapters=["default"])
            loaded = Adapter.of(folder)
            for server in self.servers:
                server.ready(loaded)
                if self._adapter and self._adapter.name != loaded.name:
                    server.unload(self._adapter.name)
                self._test(server, loaded, model)
        devices.wait()
        before, self._adapter = self._adapter, Adapter.of(folder)
        if self._first and before and before.folder != self._adapter.folder:
            shutil.rmtree(before.folder, ignore_errors=True)

    def _test(self, server: Server, adapter: Adapter, model: PeftModel) -> None:
        """Raise WorkError if it plays something else, even with the adapter loaded anew."""
        policy = OnVllm("student", [server], adapter, self.processor, self.probe.temperature, self.max_tokens)
        if not self.probe.doubt(policy, model, self.processor):
            return
        server.reload(adapter)
        if said := self.probe.doubt(policy, model, self.processor):
            raise WorkError(
                f"{server.url} does not play what is trained: {said}. If it is a server of your own, start it on "
                "models/base with the flags of serving/vllm.py. If rl has started it, run rl again, which continues; "
                'if that doesn\'t help, write vllm.environment: {VLLM_USE_V2_MODEL_RUNNER: "0"} into compute.yaml'
            )

    def policy(self, temperature: float, max_tokens: int, random_seed: int, place: int) -> OnVllm:
        """Episodes go to the servers in turn."""
        server = self.servers[place % len(self.servers)]
        return OnVllm("student", [server], self._adapter, self.processor, temperature, max_tokens, random_seed)

    def sleep(self) -> None:
        devices.wait()  # others may still play
        if self.sleeps and self._first:
            for server in self.servers:
                server.sleep()
        self._asleep = self.sleeps
        devices.wait()

    def wake(self) -> None:
        if not self._asleep:
            return
        torch.cuda.empty_cache()
        devices.wait()
        if self._first:
            for server in self.servers:
                server.wake()
        self._asleep = False
        devices.wait()

    def close(self) -> None:
        """For servers that go on without this run. Those that sleep are its own, and end with it."""
        if self._first and self._adapter and not self.sleeps:
            for server in self.servers:
                server.unload(self._adapter.name)


def sampler(
    servers: Sequence[Server],
    profile: Profile,
    base: Path,
    processor: "Qwen3VLProcessor",
    folder: Path,
    sleeping: bool,
    probe: Callable[[], Probe],
) -> Sampler:
    """On these servers, or in process where there is none. folder: the run's; probe: what servers are tested by."""
    if servers:
        return VllmSampler(servers, processor, folder / "policies", probe(), profile.sampling.max_tokens, sleeping)
    return InProcessSampler(loading.load(base, dtype=profile.dtype)[0], processor)


def weights_digest(model: PeftModel) -> str:
    """A name for the adapter's weights."""
    hashed = hashlib.sha256()
    for name, weight in sorted(get_peft_model_state_dict(model, adapter_name="default").items()):
        hashed.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
