"""How well each way of crediting decisions points uphill: its gradient against an unbiased one, from the same play.

    python benchmarks/rl_advantages.py [--groups 32]      # after `dvc repro sft`

The student plays groups of episodes. A decision's gradient is taken with respect to the weights of the model's head
alone, which needs no backward pass: advantages × (what was said - probabilities) ⊗ hidden state, over its tokens. The
reference is unbiased and noisy: what came until the episode's end, discounted by 0.99, less what a critic expected.

Printed is what an update of a given length is expected to bring, if it's made of 16 groups, RL's iteration by default:
the mean product of one group's gradient with another group's reference, divided by the length of 16 groups' mean
gradient. The reference, and so its noise, is the same for all rows: they differ more surely than their jackknife errors
say.
"""

from dataclasses import replace

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from apprentice import params, play
from apprentice.episode import Episode
from apprentice.serving import in_process
from apprentice.student.encoding import batch
from apprentice.training.advantages import advantages
from apprentice.workers import in_processes

TOGETHER = 16
"""Groups an update is made of."""


def main(groups: int = 32, adapter: str = "models/sft") -> None:
    profile = params.load().active
    rl = profile.rl
    calls = [(profile, adapter, range(900_000 + first, 900_000 + first + 4)) for first in range(0, groups, 4)]
    played = sorted(tqdm(in_processes(played_groups, calls), total=len(calls), unit="4 groups"), key=lambda one: one[0])
    episodes = [episode for _, found, _ in played for episode in found]
    factors = [factor for _, _, found in played for factor in found]

    def gradients(settings: params.Rl) -> np.ndarray:
        """(groups, weights)"""
        found = advantages(episodes, settings)
        each = [
            sum((said * advantage).T @ hidden for advantage, (said, hidden) in zip(values, factor, strict=True)).ravel()
            for values, factor in zip(found, factors, strict=True)
        ]
        return np.array(each).reshape(groups, rl.group_size, -1).sum(axis=1)

    unbiased = gradients(rl.model_copy(update={"advantage": "critic", "discount": 0.99, "gae_lambda": 1.0}))
    rows = [(name, discount, None) for name in ("return_to_go", "gigpo") for discount in (0.9, 0.97)]
    rows += [("grpo", None, None)]
    rows += [
        (name, discount, trust)
        for name in ("linear", "critic")
        for discount, trust in (
            (0.9, 0.7),
            (0.9, 0.9),
            (0.97, 0.8),
            (0.97, 0.95),
            (0.99, 0.8),
            (0.99, 0.9),
            (0.99, 1.0),
        )
    ]
    table = Table("advantage", "discount", "gae_lambda", "progress", "jackknife error")
    for name, discount, trust in rows:
        changes = {"advantage": name, "discount": discount or rl.discount, "gae_lambda": trust or rl.gae_lambda}
        mine = gradients(rl.model_copy(update=changes))
        across, along = mine @ unbiased.T, mine @ mine.T
        without = [np.delete(np.delete(square, one, 0), one, 1) for one in range(groups) for square in (across, along)]
        left = np.array([progress(*pair) for pair in zip(without[::2], without[1::2], strict=True)])
        error = np.sqrt((groups - 1) * left.var())
        table.add_row(name, str(discount or ""), str(trust or ""), f"{progress(across, along):.1f}", f"{error:.1f}")
    Console().print(table)


def played_groups(profile: params.Profile, adapter: str, seeds: range):
    """The first seed, the episodes, and for each of their decisions two factors of its gradient, token by token."""
    rl, shown = profile.rl, profile.prompt
    policy = in_process.load("student", adapter, profile.dtype, rl.temperature, profile.sampling.max_tokens, 1)
    episodes = play.play(policy, play.Spec([seed for seed in seeds for _ in range(rl.group_size)], rl.max_steps, shown))
    kept, factors = [], []
    for episode in episodes:
        factors.append(found := [])
        for start in range(0, len(episode.steps), 64):
            found += tokens(policy, [step.reply.sample.encoded for step in episode.steps[start : start + 64]])
        kept.append(slim(episode))
    return seeds[0], kept, factors


@torch.inference_mode()
def tokens(policy: in_process.InProcess, rows: list) -> list[tuple[np.ndarray, np.ndarray]]:
    inputs = batch(policy.processor, rows)
    labels = inputs.pop("labels")
    longest = max(len(row.answer_ids) for row in rows)
    hidden = policy.model.model(**inputs, last_positions=longest + 1).last_hidden_state[:, :-1]
    chances = policy.model.lm_head(hidden).softmax(dim=-1)
    said = torch.nn.functional.one_hot(labels[:, -longest:].clamp(min=0), chances.shape[-1]) - chances
    pairs = zip(said.numpy(), hidden.numpy(), rows, strict=True)
    return [(one[: len(row.answer_ids)], state[: len(row.answer_ids)]) for one, state, row in pairs]


def slim(episode: Episode) -> Episode:
    """Without pictures as the model takes them, to be sent from process to process."""
    steps = [
        replace(step, reply=replace(step.reply, sample=replace(step.reply.sample, encoded=None)))
        for step in episode.steps
    ]
    return replace(episode, steps=tuple(steps))


def progress(across: np.ndarray, along: np.ndarray) -> float:
    count = len(across)
    pairs, signal = ((square.sum() - np.trace(square)) / (count * (count - 1)) for square in (across, along))
    noise = np.trace(along) / count - signal
    return pairs / np.sqrt(max(signal, 0.0) + noise / TOGETHER)


if __name__ == "__main__":
    typer.run(main)
