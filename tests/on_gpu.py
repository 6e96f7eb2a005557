"""What only a GPU shows, on one card, in at most nine minutes, with nothing from the net.

    make test-gpu                           # a Qwen3-VL-2B with random weights, in bfloat16
    APPRENTICE_REHEARSAL=1 make test-gpu    # the same tests on the processor: two layers, 128 wide

Stages run as commands, in a folder of their own, with the settings of the profile qwen2b and few rows. Rows and prompts
have the real length. What a machine lacks is skipped with its reason, and so is what nine minutes have no room for.
"""

import csv
import gc
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from apprentice import compute, gpus, params
from apprentice.pipeline import ROOT
from apprentice.serving import vllm
from apprentice.workers import cores

sys.path.append(str(ROOT / "tests/serving"))
import stand_in

REHEARSED = gpus.rehearsed()
if REHEARSED:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # the one that is pretended
elif len(gpus.names()) > 1:
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.names()[0]

MINUTES = 30 if REHEARSED else 9  # a rehearsal may be one of several things that its processor does
LAST = time.monotonic() + 60 * MINUTES
BATCH, STEPS, EPISODES, TURNS = (8, 4, 4, 2) if REHEARSED else (32, 8, 8, 5)
"""Rows and steps of sft; episodes played together, and their decisions."""
TOKENS = 32
"""Of a reply at most; the rows' answers have 21 and more, and longer ones are left out."""
CLOSE = 0.05
"""Nats by which log-probabilities of tokens may differ in the mean where one side computes in bfloat16."""
SETTINGS = {
    "profile": "qwen2b",
    "profiles.qwen2b.sampling.max_tokens": TOKENS,
    "profiles.qwen2b.sft.epochs": 1,
    "profiles.qwen2b.sft.batch_size": BATCH,
    "profiles.qwen2b.sft.micro_batch_size": BATCH // 2,
    "profiles.qwen2b.sft.learning_rate": 1e-3,
    "profiles.qwen2b.sft.eval_steps": STEPS // 2,
    "profiles.qwen2b.sft.evaluation": {"seeds": "320000-320001", "max_steps": TURNS},
    "profiles.qwen2b.distill.rounds": 1,
    "profiles.qwen2b.distill.worlds": EPISODES,
    "profiles.qwen2b.distill.max_steps": TURNS,
    "profiles.qwen2b.distill.steps": 2,
    "profiles.qwen2b.distill.batch_size": EPISODES,
    "profiles.qwen2b.distill.micro_batch_size": EPISODES // 2,
    "profiles.qwen2b.rl.evaluation": {"seeds": "310000-310001", "every": 2},
    "profiles.qwen2b.rl.iterations": 2,
    "profiles.qwen2b.rl.groups": 2,
    "profiles.qwen2b.rl.group_size": EPISODES // 2,
    "profiles.qwen2b.rl.max_steps": TURNS,
    "profiles.qwen2b.rl.decisions": EPISODES * 2,
    "profiles.qwen2b.rl.batch_size": EPISODES,
    "profiles.qwen2b.rl.micro_batch_size": EPISODES // 2,
    "profiles.qwen2b.rl.max_invalid_rate": 1.0,
    "profiles.qwen2b.rl.reward": {"invalid": -1.0},  # so that even this student has something to learn
}
yaml = YAML(typ="safe")


@pytest.fixture(scope="module", autouse=True)
def card():
    """There is one."""
    if not (REHEARSED or gpus.used()):
        pytest.exit(
            "test-gpu: torch finds no GPU here. Run it on a machine with one, or APPRENTICE_REHEARSAL=1 make test-gpu "
            "for the same tests on the processor",
            returncode=1,
        )


@pytest.fixture(autouse=True)
def time_left():
    """What would begin too late is skipped, and what takes too long ends."""
    seconds = int(LAST - time.monotonic())
    if seconds < 20:
        pytest.skip(f"the {MINUTES} minutes are over")
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(seconds)
    yield
    signal.alarm(0)


def _too_late(*_):
    raise TimeoutError(f"the {MINUTES} minutes are over")


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


@pytest.fixture(scope="module")
def worker():
    """Runs a function in a process that stays; this one leaves the GPU's memory to the stages."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (cores(),))
    yield lambda work, *args: pool.submit(_alone, work, *args).result()
    for process in list(pool._processes.values()):
        process.kill()  # it may hang


def _alone(work, *args):
    """The function's result; nothing of it stays in the GPU's memory."""
    try:
        return work(*args)
    finally:
        gc.collect()
        if gpus.used():
            torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def top(tmp_path_factory, worker) -> Path:
    """A folder with models/base, data/sft and params.yaml."""
    top = tmp_path_factory.mktemp("gpu")
    worker(_make, top)
    return top


def _make(top: Path) -> None:
    from apprentice.data.chat_rows import row
    from apprentice.data.dataset import write_jsonl
    from apprentice.play import Spec, play
    from apprentice.players.scripted import Scripted
    from apprentice.student import sizes

    shown = settings(top).prompt
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if gpus.used() else "cpu"):
        model = sizes.build(sizes.config("2b", *((2, 128) if REHEARSED else ())))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(top / "models/base")
    sizes.processor(shown).save_pretrained(top / "models/base")
    for name, seeds, rows in (("train", [3, 4, 5, 6], BATCH * STEPS), ("val", [7], BATCH)):
        episodes = play(Scripted("expert"), Spec(seeds, 64, shown))
        taught = [row(episode, step, shown) for episode in episodes for step in episode.steps]
        write_jsonl(top / f"data/sft/{name}.jsonl", taught[:rows])


def settings(top: Path, **changes) -> params.Profile:
    """Write params.yaml into the folder, with these changes; returns the profile."""
    tree = yaml.load((ROOT / "params.yaml").read_text())
    for path, value in (SETTINGS | changes).items():
        *parents, key = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[key] = value
    with (top / "params.yaml").open("w") as file:
        yaml.dump(tree, file)
    return params.load(top / "params.yaml").active


def stage(top: Path, name: str, serving: str = "never", **changes) -> str:
    """Run a stage as `dvc repro` does; returns what it said."""
    settings(top, **changes)
    (top / "compute.yaml").write_text(f"vllm: {{use: {serving}}}\n")
    found = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, ROOT / f"stages/{name}.py"],
        cwd=top,
        env=os.environ | {"PYTHONPATH": found, "APPRENTICE_CACHE": str(top / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.strip().splitlines()[-1]
    print(said)
    return said


def beside(top: Path, name: str, *kept: str) -> Path:
    """Another folder with the same inputs."""
    other = top.parent / f"{top.name}-{name}"
    for path in ("data", "models/base", *kept):
        (other / path).parent.mkdir(parents=True, exist_ok=True)
        (other / path).symlink_to(top / path)
    return other


def column(top: Path, plot: str, name: str) -> np.ndarray:
    with (top / f"metrics/plots/{plot}.csv").open() as file:
        return np.array([float(row[name]) for row in csv.DictReader(file)])


def losses(top: Path) -> np.ndarray:
    found = np.concatenate([column(top, plot, "loss") for plot in ("sft_train", "sft_val")])
    assert np.isfinite(found).all()
    return found


@pytest.fixture(scope="module")
def taught(top) -> Path:
    """The folder once the stage sft has been there: with ZeRO-2 where there is DeepSpeed."""
    stage(top, "sft", **{"profiles.qwen2b.sft.zero": {"stage": 2 if installed("deepspeed") else 0}})
    return top


def test_sft_learns(taught):
    found = column(taught, "sft_val", "loss")
    print(f"validation losses: {found}")
    assert np.isfinite(losses(taught)).all() and found[-1] < found[0] < 13


def test_sft_is_divided_by_deepspeed(taught):
    if not installed("deepspeed"):
        pytest.skip("deepspeed is not installed: sft ran without ZeRO")
    assert list(taught.glob("cache/sft/*/checkpoint-*/global_step*/*optim_states.pt"))


def test_rl_by_turns_with_vllm(taught, tmp_path, monkeypatch):
    if REHEARSED:
        monkeypatch.setenv("APPRENTICE_VLLM", stand_in.program(tmp_path))
    elif not vllm.program(compute.Vllm()):
        pytest.skip("vLLM is not installed")
    rl(taught, "always")


def rl(taught: Path, serving: str) -> None:
    """A round with the teacher and two iterations, after which the trainer still agrees with who plays."""
    top = beside(taught, f"rl-{serving}", "models/sft")
    stage(top, "distill", serving)
    stage(top, "rl", serving)
    found = json.loads((top / "metrics/rl.json").read_text())
    off = column(top, "rl_training", "sampler_mismatch")
    print(f"sampler and trainer differ by {off} nats a token")
    assert found["iterations"] == 2 and not found["stopped"] and (top / "models/rl/adapter_model.safetensors").exists()
    assert (off < CLOSE).all() and np.isfinite(column(top, "rl_training", "entropy")).all()


def test_an_adapter_says_in_bfloat16_what_it_says_in_float32_read_back_the_same_and_merged_nearly(taught, worker):
    found = worker(_log_probabilities, taught)
    exact, without = found.pop("float32"), found.pop("without its adapter")
    print(f"loss in float32: {-exact.mean():.4f}")
    for name, other in found.items():
        off = (other - exact).abs()
        print(
            f"{name}: loss {-other.mean():.4f}, tokens differ by {off.mean():.5f} in the mean, {off.max():.3f} at most"
        )
        assert off.mean() < CLOSE and abs(other.mean() / exact.mean() - 1) < 0.01, name
    assert torch.equal(found["bfloat16, read back"], found["bfloat16"])
    assert (without - exact).abs().mean() > CLOSE


def _log_probabilities(top: Path) -> dict[str, torch.Tensor]:
    from apprentice.student import loading

    found, adapter = {}, top / "models/sft"
    for dtype in ("float32", "bfloat16"):
        model, processor = loading.load(top / "models/base", adapter, dtype)
        found[dtype] = _of_answers(model, processor, top)
    with model.disable_adapter():
        found["without its adapter"] = _of_answers(model, processor, top)
    model.save_pretrained(top / "again")
    model, _ = loading.load(top / "models/base", top / "again", dtype)
    found["bfloat16, read back"] = _of_answers(model, processor, top)
    found["bfloat16, merged"] = _of_answers(model.merge_and_unload(), processor, top)
    return found


def _rows(top: Path, count: int) -> list[list[dict]]:
    with (top / "data/sft/val.jsonl").open() as file:
        return [json.loads(line)["messages"] for line, _ in zip(file, range(count), strict=False)]


def _of_answers(model, processor, top: Path) -> torch.Tensor:
    """The log-probability of each token of some answers."""
    from apprentice.student.encoding import batch, encode_all

    return _said(model, batch(processor, encode_all(processor, _rows(top, 4))))


@torch.no_grad()
def _said(model, rows: dict[str, torch.Tensor], banned: Sequence[int] = ()) -> torch.Tensor:
    """The log-probability of each token of the answers, in order. banned: tokens that are never drawn."""
    labels = rows["labels"]
    answers = labels.shape[1] - int((labels != -100).any(dim=0).nonzero()[0])
    rows = {name: value.to(model.device) for name, value in rows.items() if name != "labels"}
    logits = model(**rows, logits_to_keep=answers + 1).logits[:, :-1].float().cpu()
    logits[..., list(banned)] = -torch.inf
    labels = labels[:, -answers:]
    return logits.log_softmax(dim=-1).gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != -100]


def test_the_student_plays_in_process(taught, worker):
    decisions, seconds, off = worker(_play, taught, settings(taught))
    print(f"{decisions} decisions in {seconds:.1f} s; drawn and computed anew, tokens differ by {off:.5f} nats")
    assert decisions == EPISODES * TURNS and off < CLOSE


def _play(top: Path, profile: params.Profile) -> tuple[int, float, float]:
    from apprentice.play import Spec, play
    from apprentice.serving import in_process
    from apprentice.student.encoding import batch

    policy = in_process.load(
        "student", str(top / "models/sft"), profile.dtype, 1.0, TOKENS, cores(), base=str(top / "models/base")
    )
    began = time.monotonic()
    episodes = play(policy, Spec(range(EPISODES), TURNS, profile.prompt))
    seconds = time.monotonic() - began
    samples = [step.reply.sample for episode in episodes for step in episode.steps]
    rows = batch(policy.processor, [sample.encoded for sample in samples[:4]])
    anew = _said(policy.model, rows, in_process.vision_tokens(policy.processor))
    drawn = torch.tensor([chance for sample in samples[:4] for chance in sample.logprobs])
    return len(samples), seconds, (anew - drawn).abs().mean().item()


def test_gradient_checkpointing_changes_no_gradient_and_takes_less_memory(taught, worker):
    found = worker(_gradients, taught, settings(taught))
    (loss, gradients, kept, memory), (same, others, fewer, less) = found[False], found[True]
    print(
        f"loss {loss:.4f} and {same:.4f}; kept {kept / 2**30:.1f} GiB, with checkpointing {fewer / 2**30:.1f}; "
        f"peak memory {memory / 2**30:.1f} GiB, with checkpointing {less / 2**30:.1f}"
    )
    assert same == pytest.approx(loss, rel=1e-3) and gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (others[name] - gradient).norm() < 0.1 * gradient.norm(), name
    assert fewer < kept / 2 and (REHEARSED or less < 0.8 * memory)


def _gradients(top: Path, profile: params.Profile) -> dict[bool, tuple[float, dict[str, torch.Tensor], int, int]]:
    """Loss, gradients of the adapter, bytes kept for them, and peak memory in bytes of a training step, without
    checkpointing and with."""
    from apprentice.student import loading
    from apprentice.student.encoding import batch, encode_all
    from apprentice.training.sft import SftTrainer

    sys.path.append(str(ROOT / "stages"))
    import sft
    from datasets import Dataset
    from transformers import TrainerCallback

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, **__):
            self.found = {
                name: parameter.grad.float().cpu()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }

    kept: list[int] = []

    def keep(part: torch.Tensor) -> torch.Tensor:
        kept.append(part.nbytes)
        return part

    found = {}
    for checkpointing in (False, True):
        changes = {"gradient_checkpointing": checkpointing, "zero": params.Zero()}
        changed = profile.model_copy(update={"sft": profile.sft.model_copy(update=changes)})
        model, processor = loading.load(top / "models/base", top / "models/sft", profile.dtype, trainable=True)
        rows = batch(processor, encode_all(processor, _rows(top, 4)))
        args = sft.arguments(changed, top / "gradients", 4, 1, validated=False)
        args.max_steps, args.save_strategy, args.dataloader_num_workers = 1, "no", 0
        args.dataloader_persistent_workers, args.dataloader_multiprocessing_context = False, None
        trainer = SftTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"images": [[0]] * 4}),
            data_collator=lambda _, rows=rows: dict(rows),
            processing_class=processor,
            callbacks=[gradients := Gradients()],
        )
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if gpus.used():
            torch.cuda.reset_peak_memory_stats()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
            trainer.train()
        memory = torch.cuda.max_memory_allocated() if gpus.used() else 0
        found[checkpointing] = trainer.state.log_history[0]["train_loss"], gradients.found, sum(kept), memory
        del trainer, model
        gc.collect()
    return found


def test_sft_learns_with_weights_of_4_bits(taught):
    if not installed("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    top = beside(taught, "nf4")
    tree = yaml.load((ROOT / "params.yaml").read_text())["profiles"]["qwen2b"]["sft"]["lora"]
    stage(top, "sft", **{"profiles.qwen2b.sft.lora": tree | {"quantization": "nf4"}})
    found = column(top, "sft_val", "loss")
    print(f"validation losses: {found}")
    assert np.isfinite(losses(top)).all() and found[-1] < found[0] < 13


def test_rl_in_process(taught):
    rl(taught, "never")
