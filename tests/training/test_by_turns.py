"""Ranks and servers on the same GPUs: all ranks go through the same waits, and what was made is not lost at the end.

GPUs are pretended; a server is a program that answers like vLLM, with the tiny student behind it.
"""

import os
import time
from pathlib import Path

import pytest
import stand_in
import torch

from apprentice.compute import Vllm
from apprentice.serving.vllm import Plan, Server, Servers
from apprentice.training import devices


class Weights:
    """What a sampler asks of a PEFT model."""

    def save_pretrained(self, folder: Path, selected_adapters: list[str]) -> None:
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text(folder.name)


class Doubtful:
    """A probe that doubts a server so many times."""

    temperature = 1.0

    def __init__(self, times: int):
        self.times = times

    def doubt(self, policy, model, processor) -> str | None:
        self.times -= 1
        return "it plays something else" if self.times >= 0 else None


def sampler(server: Server, folder: Path, doubts: int = 0, sleeps: bool = True):
    from transformers import AutoTokenizer  # noqa: F401  before the clock runs

    from apprentice.training.sampler import VllmSampler

    return VllmSampler([server], None, folder, Doubtful(doubts), 4, sleeps)


def take_turns(server: Server, folder: Path) -> None:
    """What a rank does in two iterations."""
    torch.distributed.init_process_group("gloo")
    player = sampler(server, folder)
    for iteration in (0, 1):
        player.wake()
        player.update(Weights(), iteration)
        player.sleep()
    player.close()
    (folder / f"rank {os.environ['RANK']}").touch()


@pytest.fixture
def server(tmp_path, tiny_folder):
    found = Vllm(use="always", program=stand_in.program(tmp_path), start_timeout=120.0)
    with Servers(Plan((None,)), found, tiny_folder, "float32", []) as students:
        yield students.servers[0]


def said(server: Server) -> list[str]:
    """What the server was asked to do, less what is asked of a fresh one."""
    lines = Path(server.log).read_text().splitlines()
    return [line.removeprefix("/") for line in lines if line.startswith("/") and line != "/chat/completions"]


def test_two_ranks_take_turns_with_a_server_and_end(server, tmp_path):
    folder = tmp_path / "policies"
    folder.mkdir()
    devices.launch(take_turns, 2, server, folder)
    assert {file.name for file in folder.glob("rank *")} == {"rank 0", "rank 1"}
    once = ["load_lora_adapter", "sleep"]
    assert said(server) == [*once, "wake_up", "load_lora_adapter", "unload_lora_adapter", "sleep"]


def wait_long(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    devices.wait()
    rank = torch.distributed.get_rank()
    began = time.process_time()
    if rank == 0:
        time.sleep(4)
    devices.wait()
    (folder / str(rank)).write_text(str(time.process_time() - began))


def test_a_rank_that_waits_computes_nothing(tmp_path):
    """On the processor, too: its cores are the worlds'."""
    devices.launch(wait_long, 2, tmp_path)
    assert float((tmp_path / "1").read_text()) < 1.0
