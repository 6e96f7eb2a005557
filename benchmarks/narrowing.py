"""What `product` and `lighten` save: a reply, log-probabilities and a training step of the student, in turn.

python benchmarks/narrowing.py [--rows 32] [--adapter models/sft]      # one core; after `dvc repro sft`
"""

from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
import typer

from apprentice import params
from apprentice.data.chat_rows import row
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.serving import in_process
from apprentice.student import loading, onednn
from apprentice.student.encoding import batch, encode_all
from apprentice.student.narrowing import narrow

PLAIN = "as PyTorch has it"


def main(rows: int = 32, adapter: Path = Path("models/sft"), times: int = 15) -> None:
    from trl.trainer.utils import add_fused_lm_head

    profile = params.load().active
    torch.set_num_threads(1)
    works, here = {}, onednn._HERE
    for name in (PLAIN, "with product", "and lightened"):
        player, processor = loading.load("models/base", adapter, profile.dtype)
        player = player.merge_and_unload()
        learner, _ = loading.load("models/base", adapter, profile.dtype, trainable=True)
        add_fused_lm_head(learner.get_base_model(), outputs=("log_probs", "entropy"))
        if name == "and lightened":
            narrow(player)
            narrow(learner.get_base_model())
        works[name] = work(player, learner, processor, profile, rows)
    seconds = {name: {what: [] for what in each} for name, each in works.items()}
    for _ in range(times):
        for name, each in works.items():
            onednn._HERE = here and name != PLAIN
            for what, call in each.items():
                began = perf_counter()
                call()
                seconds[name][what].append(perf_counter() - began)
    for what in seconds[PLAIN]:
        took = {name: median(each[what][1:]) / rows * 1000 for name, each in seconds.items()}
        told = (f"{name} {each:.2f} ({took[PLAIN] / each:.2f} times as fast)" for name, each in took.items())
        print(f"{what}, ms a row: {', '.join(told)}")


def work(player, learner, processor, profile: params.Profile, count: int) -> dict:
    episodes = play(Scripted("expert"), Spec(range(900_000, 900_000 + count), 20, profile.prompt))
    chats = [row(episode, episode.steps[-1], profile.prompt)["messages"] for episode in episodes]
    encoded = encode_all(processor, chats)
    asked = [replace(one, answer_ids=[]) for one in encoded]
    draws = np.random.default_rng(0).random((count, profile.sampling.max_tokens))
    inputs = batch(processor, encoded)

    def train() -> None:
        learner(**inputs, fused_lm_head=True, use_cache=False).loss.backward()
        learner.zero_grad()

    @torch.no_grad()
    def score() -> None:
        learner(**inputs, fused_lm_head=True, use_cache=False)

    return {
        "a reply": lambda: in_process.generate(player, processor, asked, draws, 1.0),
        "log-probabilities": score,
        "a training step": train,
    }


if __name__ == "__main__":
    typer.run(main)
