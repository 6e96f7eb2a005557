"""Ranks and servers on the same GPUs: all ranks go through the same waits, and what was made is not lost at the end.

GPUs are pretended; a server is a program that answers like vLLM, with the tiny student behind it.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in
import torch
from accelerate import PartialState
from ruamel.yaml import YAML
from small import SMALL, checkout, started, wait_for
from test_vllm import program, running  # noqa: F401  the fixture

from apprentice import gpus, params
from apprentice.data.chat_rows import row
from apprentice.data.dataset import write_jsonl
from apprentice.errors import WorkError
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.serving.vllm import Adapter, Server
from apprentice.training import devices
from apprentice.training.sampler import VllmSampler


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
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda names: [], eos_token_id=0, pad_token_id=0)
    return VllmSampler([server], SimpleNamespace(tokenizer=tokenizer), folder, Doubtful(doubts), 4, sleeps)


def take_turns(server: Server, folder: Path) -> None:
    """What a rank does in two iterations."""
    PartialState(cpu=True)
    player = sampler(server, folder)
    for iteration in (0, 1):
        player.wake()
        player.update(Weights(), iteration)
        player.sleep()
    player.close()
    (folder / f"rank {os.environ['RANK']}").touch()


@pytest.fixture
def server(program):  # noqa: F811
    with running(program) as students:
        yield students.servers[0]


def said(server: Server) -> list[str]:
    """What the server was asked to do, less what is asked of a fresh one."""
    lines = Path(server.log).read_text().splitlines()
    paths = [line.partition("?")[0].removeprefix("/v1").removeprefix("/") for line in lines if line.startswith("/")]
    return [path for path in paths if path != "chat/completions"]


def test_two_ranks_take_turns_with_a_server_and_end(server, tmp_path):
    folder = tmp_path / "policies"
    folder.mkdir()
    devices.launch(take_turns, 2, server, folder)
    assert {file.name for file in folder.glob("rank *")} == {"rank 0", "rank 1"}
    once = ["load_lora_adapter", "sleep"]
    assert said(server) == [*once, "wake_up", "load_lora_adapter", "unload_lora_adapter", "sleep"]


def test_a_server_that_is_wrong_is_given_its_adapter_again(server, tmp_path):
    sampler(server, tmp_path / "policies", doubts=1).update(Weights(), 0)
    again = ["unload_lora_adapter", "reset_prefix_cache", "reset_encoder_cache", "load_lora_adapter"]
    assert said(server) == ["load_lora_adapter", *again]


def test_a_server_that_stays_wrong_ends_the_work(server, tmp_path):
    with pytest.raises(WorkError, match=r"does not play what is trained: it plays something else.*V2_MODEL_RUNNER"):
        sampler(server, tmp_path / "policies", doubts=2).update(Weights(), 0)


def test_an_adapter_that_cannot_be_unloaded_costs_no_result(tmp_path):
    """The servers may have ended when the run has."""
    player = sampler(Server("http://127.0.0.1:9"), tmp_path, sleeps=False)
    player._adapter = Adapter("somewhere", "adapter-0")
    player.close()


SHORT = SMALL | {
    "profiles.tiny.sampling.max_tokens": 4,
    "profiles.tiny.prompt": {"mode": "image", "rules": False, "history": 2},
    "profiles.tiny.rl.iterations": 2,
    "profiles.tiny.rl.max_steps": 4,
    "profiles.tiny.rl.group_size": 2,
    "profiles.tiny.rl.decisions": 16,
    "profiles.tiny.rl.batch_size": 8,
    "profiles.tiny.rl.evaluation": {"seeds": "310000-310001", "every": 2},
}


@pytest.fixture(scope="module")
def models(tiny_folder, tmp_path_factory) -> Path:
    """models/base and models/distill, whose adapter is in the vision tower too."""
    from peft import LoraConfig, get_peft_model

    from apprentice.student import loading

    folder = tmp_path_factory.mktemp("adapted") / "models"
    shutil.copytree(tiny_folder, folder / "base")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(loading.load(tiny_folder)[0], lora).save_pretrained(folder / "distill")
    return folder


@pytest.fixture
def top(models, tmp_path) -> Path:
    """A checkout for a machine with two GPUs."""
    folder = checkout(tmp_path / "top", SHORT)
    shutil.copytree(models, folder / "models")
    return folder


def on_two_gpus(top: Path, monkeypatch, does_wrong: str = "", **settings) -> None:
    """Stages in this checkout play on stand-ins; does_wrong: what these do."""
    served = {"program": stand_in.program(top.parent, STAND_IN=does_wrong), "start_timeout": 120} | settings
    with (top / "compute.yaml").open("w") as file:
        YAML(typ="safe").dump({"vllm": served}, file)
    monkeypatch.setenv(gpus.REHEARSAL, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


def test_rl_ends_with_its_results_when_two_ranks_and_two_servers_take_turns(top, monkeypatch):
    """The default on GPUs, with the default `critic`, although a server ends in its sleep."""
    on_two_gpus(top, monkeypatch)
    process, logs = started(top, top / "cache", "stages/rl.py"), {}
    wait_for(lambda: list(top.glob("cache/serve/*/0.log.asleep")), process, 600)
    [pid] = [line.split()[1] for line in next(top.glob("cache/serve/*/0.log")).read_text().splitlines()[:1]]
    os.kill(int(pid), signal.SIGKILL)

    def last() -> bool:
        logs.update({file.name: file.read_text() for file in top.glob("cache/serve/*/*.log")})
        return (top / "metrics/rl.json").exists()

    wait_for(last, process, 600)
    assert process.wait(60) == 0, process.stdout.read().decode()[-3000:]
    metrics = json.loads((top / "metrics/rl.json").read_text())
    assert metrics["iterations"] == 2 and metrics["stopped"] is None
    assert (top / "models/rl/adapter_model.safetensors").exists()
    assert logs["0.log"].count("started") == 2 and logs["1.log"].count("started") == 1
    answered = [logs[f"{number}.log"].count("/chat/completions") for number in (0, 1)]
    assert max(answered) < 1.3 * min(answered), "servers have as much to do"


def test_sft_trains_while_servers_sleep_and_plays_when_they_are_awake(models, tmp_path, monkeypatch):
    top = checkout(tmp_path / "top", SHORT | {"profiles.tiny.sampling.max_tokens": 16})
    shutil.copytree(models, top / "models")
    shown = params.load(top / "params.yaml").active.prompt
    for side, seeds in {"train": [3, 4, 5], "val": [6]}.items():
        episodes = play(Scripted("expert"), Spec(seeds, 40, shown))
        rows = [row(episode, step, shown) for episode in episodes for step in episode.steps]
        (top / "data/sft").mkdir(parents=True, exist_ok=True)
        write_jsonl(top / f"data/sft/{side}.jsonl", rows)
    on_two_gpus(top, monkeypatch)
    process, logs = started(top, top / "cache", "stages/sft.py"), {}

    def last() -> bool:
        logs.update({file.name: file.read_text() for file in top.glob("cache/serve/*/*.log")})
        return (top / "metrics/sft.json").exists()

    wait_for(last, process, 600)
    assert process.wait(60) == 0, process.stdout.read().decode()[-3000:]
    assert len((top / "metrics/plots/sft_held_out.csv").read_text().splitlines()) == 3  # after 5 and 8 steps
    for log in logs.values():
        done = [name for name in re.findall(r"/(sleep|wake_up|load_lora_adapter|chat/completions)", log)]
        played = done[done.index("sleep") :]
        assert list(dict.fromkeys(played)) == ["sleep", "wake_up", "load_lora_adapter", "chat/completions"]
        assert played.count("sleep") == 3 and played[-1] == "sleep"
