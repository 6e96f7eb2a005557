"""Rollouts, decisions a second, for one model on one machine: ours in process, ours on vLLM, TRL's, BALROG's way.

    python benchmarks/rollout.py [--adapter models/sft] [--episodes 16] [--steps 20]

TRL's is GRPOTrainer's `environment_factory`: one growing conversation an episode, all of whose pictures are processed
again at each turn. A student of single decisions says nothing of use in it, so every reply is made to be the tool call
it would be; the model computes as it would. BALROG's is a process for each episode, which asks the same vLLM server one
decision at a time. Each way plays a few decisions first, unmeasured. vLLM is started as compute.yaml says (on a CPU,
after `make vllm`).
"""

import multiprocessing
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import httpx2
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import LogitsProcessor

from apprentice import compute, gpus, params, play, prompt
from apprentice.policy import Turn
from apprentice.serving import in_process, on_vllm, vllm
from apprentice.student import encoding, loading
from apprentice.workers import cores
from apprentice.world import World, png

BASE = Path("models/base")


def main(adapter: Path = Path("models/sft"), episodes: int = 16, steps: int = 20) -> None:
    profile = params.load().active
    shown, tokens = profile.prompt, profile.sampling.max_tokens
    seeds = list(range(900_000, 900_000 + episodes))
    # A process of its own, whose end gives the GPU's memory back: vLLM takes most of what it finds free.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        rates, shares = alone.submit(in_this_process, adapter, seeds, steps, profile).result()

    serving = compute.load().vllm.model_copy(update={"use": "always"})
    plan = vllm.plan(serving, gpus.names(), training=False)
    with vllm.Servers(plan, serving, BASE, profile.dtype, [adapter]) as running:
        there = on_vllm.load("student", running.servers, str(adapter), 1.0, tokens, str(BASE))
        rates["ours, on vLLM"], shares["ours, on vLLM"] = ours(there, seeds, steps, shown)
        rates["BALROG's way, on vLLM"] = balrog(running.servers[0].url, adapter, seeds, steps, shown, tokens)

    table = Table("rollouts", "decisions/s", "relative")
    slowest = min(rates.values())
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{rate:.1f}", f"{rate / slowest:.1f}")
    Console().print(table)
    table = Table("where the time goes", *next(iter(shares.values())))
    for name, found in shares.items():
        table.add_row(name, *(f"{share:.1%}" for share in found.values()))
    Console().print(table)


def in_this_process(
    adapter: Path, seeds: list[int], steps: int, profile: params.Profile
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The rates, and where the time goes, of what needs no server."""
    torch.set_num_threads(cores())
    here = in_process.load("student", str(adapter), profile.dtype, 1.0, profile.sampling.max_tokens, cores())
    rate, shares = ours(here, seeds, steps, profile.prompt)
    # What it's compared with gets the better numbers of its kind: time spent in generation alone.
    rates = {"ours, in process": rate, "TRL, environment_factory": trl(adapter, seeds, steps, profile)}
    return rates, {"ours, in process": shares}


def ours(policy, seeds: list[int], steps: int, shown: params.Prompt) -> tuple[float, dict[str, float]]:
    """Decisions a second, and the shares of the time."""
    play.play(policy, play.Spec(seeds, 2, shown))
    with timed() as spent:
        began = perf_counter()
        played = play.play(policy, play.Spec(seeds, steps, shown))
        seconds = perf_counter() - began
    shares = {name: spent[name] / seconds for name in ("world", "picture", "prompt", "parse")}
    shares["server, model and the rest"] = 1 - sum(shares.values())
    return sum(len(episode.steps) for episode in played) / seconds, shares


@contextmanager
def timed():
    """The seconds spent in the parts of a rollout, each without the parts within it."""
    spent, running = defaultdict(float), []
    parts = [
        (World, "__init__", "world"),
        (World, "reset", "world"),
        (World, "step", "world"),
        (png, "encode", "picture"),
        (prompt, "picture", "picture"),
        (prompt, "messages", "prompt"),
        (encoding, "encode_all", "prompt"),
        (in_process, "encode_all", "prompt"),
        (prompt, "parse", "parse"),
    ]
    originals = [getattr(owner, name) for owner, name, _ in parts]

    def clocked(work, kind):
        def call(*args, **kwargs):
            began, within = perf_counter(), len(running)
            running.append(0.0)
            try:
                return work(*args, **kwargs)
            finally:
                seconds = perf_counter() - began
                spent[kind] += seconds - running.pop()
                if within:
                    running[-1] += seconds

        return call

    for (owner, name, kind), original in zip(parts, originals, strict=True):
        setattr(owner, name, clocked(original, kind))
    try:
        yield spent
    finally:
        for (owner, name, _), original in zip(parts, originals, strict=True):
            setattr(owner, name, original)


def trl(adapter: Path, seeds: list[int], steps: int, profile: params.Profile) -> float:
    """TRL's own loop. Only the time in which it generates and acts counts, none of the training."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Environment:
        def reset(self, seed: int, **_) -> list[dict]:
            self.world, self.history = World(seed, max_steps=steps), ()
            return self._shown(self.world.reset())

        def act(self, actions: list[str]) -> list[dict]:
            """Act in the world.

            Args:
                actions: The actions to take, in order.
            """
            asked = prompt.parse(prompt.answer(actions), profile.prompt.max_actions).actions or ("noop",)
            self.history += asked
            if not self.world.done:
                self.seen = self.world.step(asked[0]).observation
            return self._shown(self.seen)

        def _shown(self, observation) -> list[dict]:
            self.seen, turn = observation, Turn(observation, self.history, profile.prompt)
            words = prompt.text(turn.observation, turn.settings, turn.history)
            picture = Image.fromarray(prompt.picture(observation, profile.prompt))
            return [{"type": "image", "image": picture}, {"type": "text", "text": words}]

    model, processor = loading.load(BASE, adapter, profile.dtype, trainable=True)
    said = encoding.encode(processor, [{"role": "user", "content": "?"}, prompt.answer(["noop"])]).answer_ids
    alone = model.get_base_model()
    generate = alone.generate

    def calling(*args, input_ids: torch.Tensor, **kwargs):
        return generate(*args, input_ids=input_ids, logits_processor=[Said(said, input_ids.shape[1])], **kwargs)

    alone.generate = calling
    asked = [
        {"role": "system", "content": [{"type": "text", "text": prompt.system(profile.prompt)}]},
        {"role": "user", "content": [{"type": "text", "text": ""}]},
    ]
    rows = [{"prompt": asked, "seed": seed} for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=len(seeds),
            num_generations=2,
            max_completion_length=4096,
            max_tool_calling_iterations=steps,
            use_cpu=not gpus.used(),
            bf16=profile.dtype == "bfloat16",
            gradient_checkpointing=False,
            learning_rate=0.0,
            generation_kwargs={"suppress_tokens": in_process.vision_tokens(processor), "max_new_tokens": None},
            report_to="none",
            save_strategy="no",
        )
        trainer = GRPOTrainer(
            model,
            lambda environments, **_: [float(len(one.history)) for one in environments],
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
            environment_factory=Environment,
        )
        inputs = [row for row in rows[: len(rows) // 2] for _ in range(2)]
        began = perf_counter()
        trainer._generate_and_score_completions(inputs)
        seconds = perf_counter() - began
        return sum(len(environment.history) for environment in trainer.environments) / seconds


class Said(LogitsProcessor):
    """Lets every reply be the same."""

    def __init__(self, reply: list[int], start: int):
        self.reply, self.start = reply, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.reply[input_ids.shape[1] - self.start]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token], device=scores.device), 0.0)


def balrog(url: str, adapter: Path, seeds: list[int], steps: int, shown: params.Prompt, tokens: int) -> float:
    model = vllm.Adapter.of(adapter).name
    context = multiprocessing.get_context("spawn")
    started = context.Barrier(len(seeds) + 1)
    with context.Pool(len(seeds), initializer=started.wait) as pool:
        started.wait()
        began = perf_counter()
        calls = [(url, model, seed, steps, shown, tokens) for seed in seeds]
        decisions = sum(pool.starmap(one_episode, calls, chunksize=1))
        return decisions / (perf_counter() - began)


def one_episode(url: str, model: str, seed: int, steps: int, shown: params.Prompt, tokens: int) -> int:
    with httpx2.Client(timeout=600) as client:
        world, history, decisions = World(seed, max_steps=steps), (), 0
        observation = world.reset()
        while not world.done:
            body = {
                "model": model,
                "messages": prompt.messages(observation, shown, history),
                "tools": prompt.TOOLS,
                "max_tokens": tokens,
                "temperature": 1.0,
            }
            answer = client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()
            action = (prompt.parse(answer["choices"][0]["message"], shown.max_actions).actions or ("noop",))[0]
            observation, history, decisions = world.step(action).observation, (*history, action), decisions + 1
        return decisions


if __name__ == "__main__":
    typer.run(main)
