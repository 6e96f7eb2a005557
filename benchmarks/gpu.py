"""What this machine's GPU does with Qwen3-VL: tokens a second in sft, decisions a second in play, an iteration of rl.

    python benchmarks/gpu.py                          # 2b and 8b, at most nine minutes
    python benchmarks/gpu.py --size 4b --only sft     # rows whose names begin so
    python benchmarks/gpu.py --write                  # rates with the profile's settings into rates.yaml
    python benchmarks/gpu.py --size tiny --steps 3    # every row on a processor, to try this program

Nothing comes from the net: weights are random, sizes are the real ones, and rows are the expert's decisions as the
profile's prompt shows them, as long as with the hub's tokenizer. Replies in play have as many tokens as a real one.
A row is printed as it comes. One that takes too long, or more memory than there is, says so, and the next follows.

The work is done by a process that stays, since starting one takes longer than most rows; after a failure there is a new
one.
"""

import gc
import importlib.util
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from ruamel.yaml import YAML

from apprentice import compute, gpus, params, play
from apprentice.pipeline import ROOT
from apprentice.student import sizes
from apprentice.workers import cores, end_with_parent
from apprentice.world import World

REPLY = 30
"""Tokens of a reply: those of a tool call with one action."""
BATCHES = (32, 64, 128)
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s, from NVIDIA's data sheets; of others, what a large product of matrices reaches."""
MOST = 200.0
"""Seconds that a row may take, the start of the process or of a server with it."""
PARTS = ("play", "worlds", "log-probabilities", "update", "sync")
"""Of an iteration of rl; worlds is the making of them."""
yaml = YAML(typ="safe")


@dataclass
class Job:
    """Some rows of the table that are measured together."""

    names: list[str]
    work: Callable[..., Iterator[dict]]
    """Gives a row's figures for each of the names: tokens, mfu, decisions, memory, note."""
    args: tuple
    group: bool = False
    """In a process group, as DeepSpeed wants it."""
    found: list[dict] = field(default_factory=list)


def main(
    size: Annotated[list[str], typer.Option(help="2b, 4b, 8b, or tiny")] = ["2b", "8b"],  # noqa: B006
    only: Annotated[str, typer.Option(help="rows whose names begin so: sft, play, rl, or a whole name")] = "",
    steps: Annotated[int, typer.Option(help="training steps of a row of sft, the first two of which warm up")] = 10,
    minutes: Annotated[float, typer.Option(help="what has not begun by then is left out")] = 9.0,
    write: Annotated[bool, typer.Option(help="write the measured rates into src/apprentice/cloud/rates.yaml")] = False,
) -> None:
    """Print the table."""
    if unknown := set(size) - {*sizes.PARAMETERS, "tiny"}:
        raise typer.BadParameter(f"--size {min(unknown)}: sizes are {', '.join(sizes.PARAMETERS)} and tiny")
    if set(size) != {"tiny"} and not (gpus.used() or gpus.rehearsed()):
        raise typer.BadParameter(
            "there is no GPU here, where the hub's sizes take hours; --size tiny shows what the table is like"
        )
    if write and ("tiny" in size or not gpus.used()):
        raise typer.BadParameter("--write is for rates of a GPU and of the hub's sizes")
    card = torch.cuda.get_device_name() if gpus.used() else "processor"
    last = time.monotonic() + 60 * minutes
    if len(gpus.names()) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.names()[0]
    print(f"{card}, torch {torch.__version__}; rates a second")
    print(line("size", "what", "tokens", "of peak", "decisions", "GiB", "took", "note"), flush=True)
    with tempfile.TemporaryDirectory() as top:
        worker = Worker()
        try:
            for one in size:
                jobs = jobs_of(one, Path(top), steps)
                for job in jobs:
                    if any(name.startswith(only) for name in job.names):
                        run(job, one, worker, last)
                if write:
                    record(one, card, jobs)
        finally:
            worker.end()


def jobs_of(size: str, top: Path, steps: int) -> list[Job]:
    """All that is measured of a size, what tells most first."""
    micro = profile_of(size).sft.micro_batch_size
    missing = {name for name in ("deepspeed", "bitsandbytes") if importlib.util.find_spec(name) is None}
    variants = {
        "as the profile": {},
        f"no checkpointing, {micro // 4 or 1} rows": {"gradient_checkpointing": False, "micro": micro // 4 or 1},
        "no LoRA in the tower": {"lora": {"vision": False}},
        f"{micro * 2} rows at once": {"micro": micro * 2},
        "QLoRA": {"lora": {"quantization": "nf4"}},
        "no checkpointing": {"gradient_checkpointing": False},
        "without ZeRO": {"zero": params.Zero()},
    }
    if "bitsandbytes" in missing:
        del variants["QLoRA"]
        print("bitsandbytes is not installed: no QLoRA")
    if "deepspeed" in missing:
        print("deepspeed is not installed: sft without ZeRO")
        variants = {name: changes | {"zero": params.Zero()} for name, changes in variants.items()}
        del variants["without ZeRO"]
    jobs = []
    for name, changes in variants.items():
        zero = "zero" not in changes and profile_of(size).sft.zero.stage > 0
        jobs.append(Job([f"sft, {name}"], sft, (size, top, changes, steps), group=zero))
    batches = BATCHES if size != "tiny" else (2, 4)
    jobs.append(Job([f"play in process, {batch} worlds" for batch in batches], play_here, (size, batches)))
    jobs.append(Job(["rl in process"], rl, (size, top, "never")))
    if not vllm():
        print("vLLM is not installed: play and rl in process only")
        return jobs
    jobs.append(Job([f"play on vLLM, {batch} worlds" for batch in batches], play_on_vllm, (size, top, batches)))
    return [*jobs, Job(["rl with vLLM"], rl, (size, top, "always"))]


def vllm() -> str | None:
    from apprentice.serving import vllm

    return vllm.program(compute.Vllm())


def run(job: Job, size: str, worker: "Worker", last: float) -> None:
    """Measure a job and print its rows."""
    for name in job.names:
        began = time.monotonic()
        if began > last:
            print(line(size, name, note="no time left"), flush=True)
            continue
        if not job.found:
            worker.begin(job)
        try:
            found = worker.next(min(MOST, max(30.0, last + 45 - began)))
        except RuntimeError as error:
            print(line(size, name, took=f"{time.monotonic() - began:.0f} s", note=str(error)), flush=True)
            return
        job.found.append(found)
        shown = {key: value if isinstance(value, str) else f"{value:,.4g}" for key, value in found.items()}
        shown |= {"tokens": f"{found['tokens']:,.0f}"} if "tokens" in found else {}
        shown |= {"mfu": f"{found['mfu']:.1%}"} if "mfu" in found else {}
        print(line(size, name, **shown, took=f"{time.monotonic() - began:.0f} s"), flush=True)


def line(size="", name="", tokens="", mfu="", decisions="", memory="", took="", note="") -> str:
    return f"{size:<5}{name:<34}{tokens:>9}{mfu:>9}{decisions:>11}{memory:>8}{took:>7}  {note}".rstrip()


def record(size: str, card: str, jobs: list[Job]) -> None:
    """Write what was measured with the profile's settings into rates.yaml."""
    from apprentice.cloud.estimate import record

    found = {name: row for job in jobs for name, row in zip(job.names, job.found, strict=False)}

    def of(kind: str, *names: str) -> float | None:
        return next((found[name][kind] for name in names if name in found), None)

    record(
        profile_of(size).student.model,
        card,
        date.today().isoformat(),
        sft_tokens_per_second=of("tokens", "sft, as the profile"),
        rl_tokens_per_second=of("tokens", "rl with vLLM", "rl in process"),
        play_decisions_per_second=of("decisions", "play on vLLM, 64 worlds", "play in process, 32 worlds"),
    )


class Worker:
    """The process that measures."""

    def __init__(self):
        self._process = None
        self._group = False

    def begin(self, job: Job) -> None:
        """Have it begin a job: in a new process where the last has failed, or has no process group like this one's."""
        if self._process and self._group != job.group:
            self.end()
        if not self._process:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process, self._group = context.Process(target=serve, args=(theirs, job.group)), job.group
            self._process.start()
            theirs.close()
        self._pipe.send((job.work, job.args, len(job.names)))

    def next(self, seconds: float) -> dict:
        """The next row's figures. Raises RuntimeError that says why there are none."""
        try:
            if not self._pipe.poll(seconds):
                self.end()
                raise RuntimeError(f"not done after {seconds:.0f} s")
            found = self._pipe.recv()
        except EOFError:
            self.end()
            raise RuntimeError("the process was ended: most likely the machine's memory was full") from None
        if isinstance(found, str) or found.pop("last"):
            self.end()
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.join()
            self._process = None


def serve(pipe, group: bool) -> None:
    """Do jobs as they come, and send the figures of each row, or why there are none."""
    import threading

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # the table is alone on the standard output
    torch.set_num_threads(cores())
    if group:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        work, args, rows = pipe.recv()
        measured = work(*args)
        for row in range(rows):
            try:
                found = next(measured)
            except torch.OutOfMemoryError as error:
                return pipe.send(f"out of memory: {str(error).split('. ')[0]}")
            except BaseException as error:
                return pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            if row + 1 == rows:
                measured.close()
                found["last"] = held()
            else:
                found["last"] = False
            pipe.send(found)


def held() -> bool:
    """Whether something of a job that is done still holds the GPU's memory."""
    gc.collect()
    if not gpus.used():
        return False
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() > 4 << 30


def profile_of(size: str) -> params.Profile:
    """The profile of a size, with replies as long as real ones."""
    profile = params.load(ROOT / "params.yaml").profiles["qwen2b" if size == "tiny" else f"qwen{size}"]
    changes: dict = {"sampling": profile.sampling.model_copy(update={"max_tokens": REPLY if size != "tiny" else 4})}
    if size == "tiny":
        changes["sft"] = profile.sft.model_copy(update={"micro_batch_size": 4})
    return profile.model_copy(update=changes)


def student(size: str, dtype: str):
    """The model with random weights, made where it computes."""
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device("cuda" if gpus.used() else "cpu"):
        model = sizes.build(sizes.config("2b", 2, 128) if size == "tiny" else sizes.config(size))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def folder(size: str, top: Path) -> Path:
    """A folder with models/base and models/sft, for what reads them."""
    from peft import get_peft_model

    from apprentice.student import loading

    made, profile = top / size, profile_of(size)
    if not (made / "models/sft").exists():
        model = student(size, profile.dtype)
        model.save_pretrained(made / "models/base")
        sizes.processor(profile.prompt).save_pretrained(made / "models/base")
        get_peft_model(model, loading.lora_config(profile.sft.lora)).save_pretrained(made / "models/sft")
    return made


def batch_of(profile: params.Profile, processor, count: int) -> dict[str, torch.Tensor]:
    """A micro-batch of the expert's decisions."""
    from apprentice.data.chat_rows import row
    from apprentice.players.scripted import Scripted
    from apprentice.student.encoding import batch, encode_all

    episode = play.play(Scripted("expert"), play.Spec([3], max(8, count), profile.prompt))[0]
    chats = [row(episode, step, profile.prompt)["messages"] for step in episode.steps]
    return batch(processor, encode_all(processor, [chats[place % len(chats)] for place in range(count)]))


def sft(size: str, top: Path, changes: dict, steps: int) -> Iterator[dict]:
    """Train for some steps as the stage does."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig

    from apprentice.student import loading
    from apprentice.training.sft import SftTrainer

    sys.path.append(str(ROOT / "stages"))
    import sft as stage

    changes = dict(changes)
    profile = profile_of(size)
    micro = changes.pop("micro", profile.sft.micro_batch_size)
    changes["lora"] = profile.sft.lora.model_copy(update=changes.get("lora", {}))
    profile = profile.model_copy(update={"sft": profile.sft.model_copy(update=changes)})
    lora, processor = profile.sft.lora, sizes.processor(profile.prompt)
    rows = batch_of(profile, processor, micro)
    before = measured_from_here()
    unlike = {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    unlike |= {"dataloader_num_workers": 0, "dataloader_persistent_workers": False, "disable_tqdm": True}
    unlike["dataloader_multiprocessing_context"] = None
    with mock.patch("apprentice.training.sft.SFTConfig", lambda **settings: SFTConfig(**settings | unlike)):
        args = stage.arguments(profile, top / "sft", micro, 1)
    if lora.quantization:
        base = folder(size, top) / "models/base"
        model = loading.load(base, dtype=profile.dtype, quantization=lora.quantization)[0]
    else:
        model = student(size, profile.dtype)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            finished()
            ends.append(time.perf_counter())

    trainer = SftTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"images": [[0]] * micro * steps}),
        data_collator=lambda _: dict(rows),
        processing_class=processor,
        peft_config=loading.lora_config(lora),
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = (ends[-1] - ends[1]) / (len(ends) - 2)  # the first two warm up
    tokens = int(rows["attention_mask"].sum())
    share = flops(model.config, rows, lora.vision) / seconds / peak()
    try:
        yield {"tokens": tokens / seconds, "mfu": share, "memory": memory() - before}
    finally:  # DeepSpeed keeps the model that it was given
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.new_empty(0)


def flops(config, rows: dict[str, torch.Tensor], vision: bool) -> float:
    """Of a step, what the model itself needs: 2 for each weight and token forward, and as much backward.

    Frozen weights have no gradients of their own; what checkpointing computes twice isn't counted; attention's products
    are. vision: gradients go through the tower.
    """
    text, tower = config.get_text_config(), config.vision_config
    count, tokens = rows["input_ids"].shape
    answers, patches = int((rows["labels"] != -100).sum()), len(rows["pixel_values"]) // count
    heads = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    weights = text.num_hidden_layers * text.hidden_size * (3 * text.intermediate_size + heads)
    attention = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * tokens**2
    forward = count * (2 * weights * tokens + attention) + 2 * answers * text.hidden_size * text.vocab_size
    width, merged = tower.hidden_size, tower.spatial_merge_size**2
    block = tower.depth * width * (4 * width + 2 * tower.intermediate_size)
    merger = (1 + len(tower.deepstack_visual_indexes)) * width * (merged * width + tower.out_hidden_size)
    seen = count * (2 * patches * (block + merger) + 4 * tower.depth * width * patches**2)
    return 2 * forward + (2 if vision else 1) * seen


def peak() -> float:
    """FLOP/s that the device can do at most in bfloat16, in float32 on a processor."""
    name = torch.cuda.get_device_name() if gpus.used() else ""
    for known, value in PEAK.items():
        if known in name:
            return value
    size, kind = (8192, torch.bfloat16) if gpus.used() else (1024, torch.float32)
    matrix = torch.randn(size, size, device="cuda" if gpus.used() else "cpu", dtype=kind)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        (matrix @ matrix).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def finished() -> None:
    """Wait until the device has done what it was given."""
    if gpus.used():
        torch.cuda.synchronize()


def measured_from_here() -> float:
    """`memory` begins anew; returns what is held of the GPU already, GiB."""
    if not gpus.used():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def memory() -> float:
    """The most that was held at a time, GiB: of the GPU, or of the process on a processor."""
    if gpus.used():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def play_here(size: str, batches: tuple[int, ...]) -> Iterator[dict]:
    """Play in process, with so many worlds at once."""
    from apprentice.serving.in_process import InProcess
    from apprentice.student.narrowing import narrow

    profile = profile_of(size)
    model = student(size, profile.dtype)
    narrow(model)
    for batch in batches:
        measured_from_here()
        policy = InProcess("student", model, sizes.processor(profile.prompt), 1.0, profile.sampling.max_tokens)
        yield {"decisions": rate(policy, batch, 3, profile.prompt), "memory": memory()}


def play_on_vllm(size: str, top: Path, batches: tuple[int, ...]) -> Iterator[dict]:
    """Play on a vLLM server that has the GPU alone, with an adapter."""
    from apprentice.serving import on_vllm, vllm

    at, profile, settings = folder(size, top), profile_of(size), compute.Vllm(use="always")
    os.environ["APPRENTICE_CACHE"] = str(top / "cache")
    held()
    base, adapter = at / "models/base", at / "models/sft"
    plan = vllm.plan(settings, gpus.names(), training=False)
    began = time.monotonic()
    with vllm.Servers(plan, settings, base, profile.dtype, [adapter]) as running:
        note = f"the server was ready after {time.monotonic() - began:.0f} s"
        for batch in batches:
            policy = on_vllm.load("student", running.servers, str(adapter), 1.0, profile.sampling.max_tokens, str(base))
            yield {"decisions": rate(policy, batch, 8, profile.prompt), "note": note}
            note = ""


def rate(policy, worlds: int, turns: int, shown: params.Prompt) -> float:
    """Decisions a second, from the moment when every world has had its first until the end."""
    ends, step = [], World.step

    def stepped(*args):
        ends.append(time.perf_counter())
        return step(*args)

    with mock.patch.object(World, "step", stepped):
        play.play(policy, play.Spec(range(900_000, 900_000 + worlds), turns + 1, shown))
    return (len(ends) - worlds) / (ends[-1] - ends[worlds - 1])


def rl(size: str, top: Path, serving: str) -> Iterator[dict]:
    """The stage's second iteration, small, and where its time goes."""
    sys.path.append(str(ROOT / "stages"))
    import rl as stage

    at, profile = folder(size, top), profile_of(size)
    held()
    os.chdir(at)
    os.environ["APPRENTICE_CACHE"] = str(top / "cache" / serving)
    groups, members, turns, decisions, batch = (8, 4, 4, 128, 64) if size != "tiny" else (2, 2, 2, 4, 4)
    changes = {"iterations": 2, "groups": groups, "group_size": members, "max_steps": turns, "decisions": decisions}
    changes |= {"batch_size": batch, "evaluation": {"seeds": "310000-310001", "every": 1000}}
    changes |= {"max_invalid_rate": 1.0, "max_kl": 1e9, "reward": {"invalid": -1.0}, "zero": {"stage": 0}}
    tree = yaml.load((ROOT / "params.yaml").read_text())
    tree["profile"] = name = "qwen2b" if size == "tiny" else f"qwen{size}"
    tree["profiles"][name]["rl"].update(changes)
    tree["profiles"][name]["sampling"]["max_tokens"] = profile.sampling.max_tokens
    with open("params.yaml", "w") as file:
        yaml.dump(tree, file)
    Path("compute.yaml").write_text(f"vllm: {{use: {serving}}}\n")
    measured_from_here()
    with mock.patch("apprentice.files.digest", lambda path: "measured"), clocked() as spent:
        stage.main()
    if "whole" not in spent:
        raise RuntimeError("the stage stopped early; its output says why")
    whole, rl = spent.pop("whole"), profile.rl
    played = spent.pop("decisions")
    learning = whole - spent["play"] - spent["worlds"] - spent["sync"]
    episodes = rl.groups * rl.group_size
    planned = {
        "play": spent["play"] / played * episodes * rl.max_steps + spent["worlds"] / (groups * members) * episodes,
        "learning": learning / decisions * rl.decisions * rl.epochs,
        "sync": spent["sync"],
    }
    parts = spent | {"the rest": whole - sum(spent.values())}
    note = f"iteration {whole:.1f} s: " + ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in parts.items())
    most = sum(planned.values())
    note += f"; one of the profile at most {most / 60:.1f} min, {planned['play'] / most:.0%} play"
    tokens = int(batch_of(profile, sizes.processor(profile.prompt), 1)["attention_mask"].sum())
    yield {
        "tokens": decisions * tokens / learning,
        "decisions": played / spent["play"],
        "memory": memory(),
        "note": note,
    }


@contextmanager
def clocked():
    """The seconds of the second iteration, by part, each without those within it; `whole`, and `decisions` played."""
    from apprentice.training.rl import RlTrainer
    from apprentice.training.sampler import InProcessSampler, VllmSampler
    from apprentice.training.self_play import SelfPlay

    spent, within, began = dict.fromkeys(PARTS, 0.0), [], 0.0
    parts = [(SelfPlay, "episodes", "play"), (World, "__init__", "worlds"), (World, "reset", "worlds")]
    parts += [(RlTrainer, "batches", "log-probabilities"), (RlTrainer, "training_step", "update")]
    parts += [(one, name, "sync") for one in (InProcessSampler, VllmSampler) for name in ("update", "sleep", "wake")]
    learn = RlTrainer.learn

    def timed(original, part):
        def call(*args, **named):
            nonlocal began
            finished()
            start = time.perf_counter()
            if part == "play":  # an iteration begins
                began = start
                spent.update(dict.fromkeys(PARTS, 0.0))
            within.append(0.0)
            try:
                return original(*args, **named)
            finally:
                finished()
                seconds = time.perf_counter() - start
                spent[part] += seconds - within.pop()
                if within:
                    within[-1] += seconds

        return call

    def learnt(trainer, *args):
        learn(trainer, *args)
        finished()
        spent["whole"], spent["decisions"] = time.perf_counter() - began, trainer.history[-1]["decisions"]

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(RlTrainer, "learn", learnt))
        for owner, name, part in parts:
            patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), part)))
        yield spent


if __name__ == "__main__":
    typer.run(main)
