"""The student on the real vLLM, on this machine's CPU: what is trained is what is served, and policies stay apart.

Run by `make test-vllm`, which installs vLLM; not part of `make test`.
"""

import asyncio
import csv
import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
import torch
from conftest import SHOWN
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from safetensors.torch import load_file
from served import KINDS, decisions
from small import SMALL, checkout, stage, started, wait_for
from test_chat_api import asked, serving
from test_vllm import gone

from apprentice import prompt
from apprentice.compute import Vllm
from apprentice.play import Spec, play
from apprentice.serving import on_vllm, vllm
from apprentice.serving.in_process import generate, shown, vision_tokens
from apprentice.student import loading
from apprentice.student.encoding import batch, encode
from apprentice.student.merge import merge
from apprentice.training.probe import Probe
from apprentice.training.sampler import VllmSampler

SETTINGS = Vllm(use="always")
LORA = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory) -> Path:
    """One that changes what is said, and the vision tower too."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(loading.load(tiny_folder)[0], LORA).save_pretrained(folder)
    loading.processor(tiny_folder).save_pretrained(folder)
    assert any("visual" in name for name in load_file(folder / "adapter_model.safetensors"))
    return folder


@pytest.fixture(scope="module")
def servers(tiny_folder, adapter, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPRENTICE_CACHE", str(tmp_path_factory.mktemp("cache")))
        command = vllm.command
        patch.setattr(vllm, "command", lambda *asked: [*command(*asked), "--enable-scale-out"])  # for /render
        here = vllm.plan(SETTINGS, [], training=True)
        with vllm.Servers(here, SETTINGS, tiny_folder, "float32", [adapter]) as running:
            yield running.servers


@pytest.fixture(scope="module")
def processor(tiny_folder):
    return loading.processor(tiny_folder)


def merged(folder: Path, adapter: Path | None):
    model, _ = loading.load(folder, adapter)
    return model.merge_and_unload() if adapter else model


def replies(policy, turns):
    """The policy's, all asked at once, each of a player of its own."""

    async def all_of_them():
        players = [policy.begin(seed) for seed in range(len(turns))]
        try:
            return await asyncio.gather(*(player.reply(turn) for player, turn in zip(players, turns, strict=True)))
        finally:
            for player in players:
                player.end()

    return asyncio.run(all_of_them())


@torch.no_grad()
def logprobs(model, processor, turn, reply, temperature: float) -> list[float]:
    """Of a reply's tokens, computed here."""
    encoded = replace(shown(processor, [turn])[0], answer_ids=reply.sample.encoded.answer_ids)
    inputs = batch(processor, [encoded])
    del inputs["labels"]
    logits = model(**inputs).logits[0, len(encoded.prompt_ids) - 1 : -1].double()
    logits[:, vision_tokens(processor)] = -torch.inf
    scores = (logits / temperature).log_softmax(dim=-1)
    return scores.gather(1, torch.tensor(encoded.answer_ids)[:, None])[:, 0].tolist()


def test_prompts_and_pixels_are_those_of_training(servers, processor, tmp_path):
    """For 240 decisions of four kinds: what vLLM makes of a turn is what training makes of the row."""
    encoded, served = [], []
    for settings in KINDS.values():
        for turn, row in decisions(settings, 60):
            body = {"model": "base", "messages": turn.messages, "tools": prompt.TOOLS, "tool_choice": "none"}
            answer = httpx2.post(f"{servers[0].url}/v1/chat/completions/render", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            encoded.append(encode(processor, row["messages"]))
            served.append(answer.json())
            assert served[-1]["token_ids"] == encoded[-1].prompt_ids
    (tmp_path / "served.json").write_text(
        json.dumps([(found.get("features") or {}).get("kwargs_data") for found in served])
    )
    decode = (
        "import json, sys, torch; from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import *\n"
        "torch.save([kwargs and {name: field.data for name, field in "
        "decode_mm_kwargs_item(kwargs['image'][0]).items()} for kwargs in json.load(open(sys.argv[1]))], sys.argv[2])"
    )
    python = Path(vllm.program(SETTINGS)).parent / "python"
    files = (tmp_path / "served.json", tmp_path / "pixels.pt")
    subprocess.run([python, "-c", decode, *files], env=os.environ | vllm._VARIABLES, check=True)
    for here, there in zip(encoded, torch.load(tmp_path / "pixels.pt"), strict=True):
        assert (here.pixel_values is None) == (there is None)
        if there:
            torch.testing.assert_close(there["pixel_values"], here.pixel_values, atol=0, rtol=0)
            assert there["image_grid_thw"].tolist() == here.image_grid_thw[0].tolist()


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_replies_are_those_of_the_model_in_process(servers, processor, tiny_folder, adapter, adapted):
    model = merged(tiny_folder, adapter if adapted else None)
    named = vllm.Adapter.of(adapter) if adapted else None
    policy = on_vllm.OnVllm("student", servers, named, processor, 0.0, 16)
    turns, parted = [turn for settings in KINDS.values() for turn, _ in decisions(settings, 6)], 0
    for turn, reply in zip(turns, replies(policy, turns), strict=True):
        here = shown(processor, [turn])[0]
        [[ids, chances, *_]] = generate(model, processor, [here], np.zeros((1, 16)), 0.0)
        sample = reply.sample
        served = sample.encoded.answer_ids
        assert sample.encoded.prompt_ids == here.prompt_ids
        # Two tokens may be as likely but for rounding: from there on, replies are about something else.
        same = next((at for at, pair in enumerate(zip(served, ids, strict=False)) if len(set(pair)) == 2), len(ids))
        np.testing.assert_allclose(sample.logprobs[: same + 1], chances[: same + 1], atol=1e-4)
        if same == len(ids):
            assert served == ids
            expected = "stop" if ids[-1] == processor.tokenizer.eos_token_id else "length"
            assert (reply.finish_reason, reply.completion_tokens) == (expected, len(ids))
        parted += same < len(ids)
        assert reply.prompt_tokens == len(here.prompt_ids)
    assert parted <= 2


def test_a_merged_model_is_served_as_it_is(servers, processor, tiny_folder, adapter, tmp_path):
    """What `apprentice merge` writes says what the adapter says on its base."""
    merge(adapter, tmp_path / "merged", str(tiny_folder))
    turns = [turn for turn, _ in decisions(SHOWN, 6)]
    found = replies(on_vllm.OnVllm("student", servers, vllm.Adapter.of(adapter), processor, 0.0, 8), turns)
    here = vllm.plan(SETTINGS, [], training=False)
    with vllm.Servers(here, SETTINGS, tmp_path / "merged", "float32", []) as others:
        again = replies(on_vllm.OnVllm("student", others.servers, None, processor, 0.0, 8), turns)
    for one, other in zip(found, again, strict=True):
        assert one.message == other.message
        np.testing.assert_allclose(one.sample.logprobs, other.sample.logprobs, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_drawn_tokens_come_with_the_chances_they_were_drawn_with(servers, processor, tiny_folder, adapter, temperature):
    model = merged(tiny_folder, adapter)
    policy = on_vllm.OnVllm("student", servers, vllm.Adapter.of(adapter), processor, temperature, 16)
    turns = [turn for turn, _ in decisions(SHOWN, 12)]
    found = replies(policy, turns)
    for turn, reply in zip(turns, found, strict=True):
        assert not set(reply.sample.encoded.answer_ids) & set(vision_tokens(processor))
        np.testing.assert_allclose(
            reply.sample.logprobs, logprobs(model, processor, turn, reply, temperature), atol=1e-3
        )
    again = replies(on_vllm.OnVllm("student", servers, vllm.Adapter.of(adapter), processor, temperature, 16), turns)
    assert [reply.sample for reply in again] == [reply.sample for reply in found]


def test_the_next_reply_after_an_update_is_the_new_policys(servers, processor, tiny_folder, tmp_path):
    """Never one of a stale prefix cache: the same prompt is asked for before and after."""
    torch.manual_seed(2)
    trained = get_peft_model(loading.load(tiny_folder)[0], LORA)
    sampler = VllmSampler(servers, processor, tmp_path, Probe(range(4), SHOWN, 1.0, 0.01), 8)
    turns = [turn for turn, _ in decisions(SHOWN, 4)] * 2
    known = set(servers[0].adapters())
    spoken, names = [], []
    for version in (0, 1):
        with torch.no_grad():
            for name, weight in trained.named_parameters():
                if "lora_B" in name and ("visual" in name if version else True):
                    weight.normal_(std=0.1)
        sampler.update(trained, version)
        [name] = set(servers[0].adapters()) - known  # the one before has been unloaded
        names.append(name)
        spoken.append(replies(sampler.policy(1.0, 8, 0, place=0), turns))
        for turn, reply in zip(turns, spoken[-1], strict=True):
            here = logprobs(trained.eval(), processor, turn, reply, 1.0)
            np.testing.assert_allclose(reply.sample.logprobs, here, atol=1e-3)
    assert names[0] != names[1]
    assert [reply.sample.logprobs[0] for reply in spoken[0]] != [reply.sample.logprobs[0] for reply in spoken[1]]
    sampler.close()
    assert set(servers[0].adapters()) == known


class Before:
    """A policy that something is done before each of its replies."""

    name = "student"

    def __init__(self, policy, what):
        self.policy, self.what = policy, what

    def begin(self, seed):
        player = self.policy.begin(seed)
        inner = player.reply

        async def reply(turn):
            await self.what(seed)
            return await inner(turn)

        player.reply = reply
        return player


def test_a_slow_episode_holds_no_other(servers, processor):
    """Episodes go on at their own pace: no turn waits for all."""
    policy, times = on_vllm.OnVllm("student", servers, None, processor, 1.0, 4), {}

    async def slow(seed: int) -> None:
        if seed == 0:
            await asyncio.sleep(1.0)
        times.setdefault(seed, []).append(time.monotonic())

    play(Before(policy, slow), Spec(range(4), 8, SHOWN))
    assert all(times[seed][-1] < times[0][2] for seed in (1, 2, 3))


@pytest.fixture(scope="module")
def top(tiny_folder, adapter, tmp_path_factory) -> Path:
    """A checkout with models/base and models/distill, whose student plays on vLLM."""
    changes = SMALL | {
        "profiles.tiny.dtype": "float32",  # as vLLM computes
        "profiles.tiny.prompt.history": SHOWN.history,
        "profiles.tiny.rl.iterations": 3,
        "profiles.tiny.rl.staleness": 1,
        "profiles.tiny.rl.advantage": "linear",
        "profiles.tiny.rl.max_invalid_rate": 1.0,  # nobody has taught this one
        "benchmark.seeds": "200000-200001",
    }
    folder = checkout(tmp_path_factory.mktemp("checkout") / "top", changes)
    (folder / "models").mkdir()
    (folder / "models/base").symlink_to(tiny_folder)
    (folder / "models/distill").symlink_to(adapter)
    return folder


def served_by(top: Path, **settings) -> None:
    tree = {"vllm": {"use": "always", "program": str(Path(vllm.program(SETTINGS)))} | settings}
    with (top / "compute.yaml").open("w") as file:
        YAML(typ="safe").dump(tree, file)


def test_a_killed_rl_stage_leaves_no_server(top, tmp_path):
    served_by(top)
    process = started(top, tmp_path / "cache", "stages/rl.py")
    logs = (tmp_path / "cache").glob
    wait_for(lambda: any("startup complete" in log.read_text() for log in logs("serve/*/0.log")), process, 600)
    children = descendants(process.pid)
    assert len(children) >= 3  # the server, its engine, the engine's worker
    os.kill(process.pid, signal.SIGKILL)
    assert gone(children)
    process.wait()


def descendants(pid: int) -> list[str]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parents[entry.name] = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
    found = [str(pid)]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def test_it_is_served_by_openais_api_as_it_answers_in_process(top, processor, tiny_folder, adapter):
    served_by(top)
    model, before, alike = merged(tiny_folder, adapter), set(descendants(os.getpid())), 0
    with serving(top, "distill") as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:

        def answer(world: int, **more):
            more = {"model": "distill", "logprobs": True, "extra_body": {"return_token_ids": True}} | more
            return client.chat.completions.create(**asked(world) | more)

        assert [model.id for model in client.models.list()] == ["distill"]
        for seed in range(6):
            reply = answer(seed, temperature=0, max_tokens=8)
            row = encode(processor, asked(seed)["messages"])
            [[ids, chances, *_]] = generate(model, processor, [row], np.zeros((1, 8)), 0.0)
            [choice] = reply.choices
            same = next(
                (at for at, pair in enumerate(zip(choice.token_ids, ids, strict=False)) if len(set(pair)) == 2), 8
            )
            served = [token.logprob for token in choice.logprobs.content]
            np.testing.assert_allclose(served[: same + 1], chances[: same + 1], atol=1e-4)
            assert reply.usage.prompt_tokens == len(row.prompt_ids)
            alike += choice.token_ids == ids
        assert alike >= 5  # two tokens may be as likely but for rounding
        drawn = (
            answer(1, n=3, max_tokens=8, seed=7),
            answer(1, n=3, max_tokens=8, seed=7),
            answer(1, n=3, max_tokens=8, seed=8),
        )
        said = [[choice.token_ids for choice in reply.choices] for reply in drawn]
        assert said[0] == said[1] != said[2] and len({tuple(ids) for ids in said[0]}) > 1
        parts = answer(1, n=3, max_tokens=8, seed=7, stream=True)
        words = "".join(part.choices[0].delta.content or "" for part in parts)
        assert words == "".join(choice.message.content for choice in drawn[0].choices)
        children = set(descendants(os.getpid())) - before
        assert len(children) >= 3  # the command, vLLM, its engine
    assert gone(children)


def test_rl_and_benchmark_play_on_a_server_that_runs_already(top, servers, tmp_path):
    """RL plays an iteration ahead, while it trains: the servers do not sleep."""
    served_by(top, endpoints=[servers[0].url])
    said = stage(top, tmp_path / "cache", "stages/rl.py")
    assert "3 iterations" in said and (top / "models/rl/adapter_model.safetensors").exists()
    with (top / "metrics/plots/rl_training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["staleness"]) for row in rows] == [0, 1, 1]
    assert 0 < float(rows[0]["sampler_mismatch"]) < 1e-3
    said = stage(top, tmp_path / "cache", "stages/benchmark_student.py", "rl")
    assert "2 episodes" in said and (top / "data/benchmark/rl.parquet").exists()


def test_an_iteration_played_ahead_is_continued_with_the_policy_that_began_it(top, tmp_path):
    served_by(top, use="never")
    weights, found = top / "models/rl/adapter_model.safetensors", []
    for name, killed in (("undisturbed", False), ("killed", True)):
        if killed:
            process = started(top, tmp_path / name, "stages/rl.py")
            wait_for(lambda: list(tmp_path.glob("killed/rl/*/checkpoint-4/trainer_state.json")), process)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stage(top, tmp_path / name, "stages/rl.py")
        found.append(weights.read_bytes())
    assert found[0] == found[1]


def test_a_server_that_dies_in_the_middle_is_started_again_and_asked_again(servers, processor, adapter, capfd):
    """The last test: its server has no life left afterwards."""
    policy, asked = on_vllm.OnVllm("student", servers, vllm.Adapter.of(adapter), processor, 1.0, 4), []

    async def kill(seed: int) -> None:
        asked.append(seed)
        if len(asked) == 10:
            port = servers[0].url.rsplit(":", 1)[1]
            [pid] = [child for child in descendants(os.getpid()) if f"--port\0{port}" in command_of(child)]
            os.kill(int(pid), signal.SIGKILL)

    episodes = play(Before(policy, kill), Spec(range(4), 10, SHOWN))
    assert [len(episode.steps) for episode in episodes] == [10] * 4
    assert "starting it again" in capfd.readouterr().err


def command_of(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
