"""How much better than expected a decision was: the algorithms that RL can be run with; and what to train on."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from apprentice.episode import Episode, Step
from apprentice.files import replacing
from apprentice.params import Rl
from apprentice.training.reward import returns, rewards
from apprentice.world.observation import ACHIEVEMENTS, TILES, VIEW

_STATIONS = {TILES.index(name) for name in ("table", "furnace")}

RIDGE = 300.0
"""Weight of the ridge penalty in decisions. On 16 episodes of the tiny student it explained most of 16 others' returns:
R² 0.26 with 1, 0.33 with 30, 0.38 with 300, 0.33 with 1,000."""
RIDGES = (RIDGE, 3e3, 3e4, 3e5)
"""Weights of the penalty on hidden states, of which the folds choose one. The tiny student has 128 of them, and Qwen
2,048 and more, which would be fitted to noise; with the last weight, they have hardly a say."""
MARGIN = 0.05
"""Share of the error by which a penalty has to be better than the first to be taken."""
FOLDS = 4
"""Parts of the groups, each measured by the value function of the others."""
FORGET = 0.7
"""What an earlier iteration's decisions weigh in the value function, as against those of the next."""


def advantages(
    episodes: Sequence[Episode], settings: Rl, scores: Sequence[float] | None = None, critic: "Critic | None" = None
) -> list[np.ndarray]:
    """An advantage for each decision, by settings.advantage.

    episodes: in groups of settings.group_size on the same world seed. scores: the judge's, for each episode.
    critic: the value function of the iterations before, for those algorithms that have one; it learns from these.

    Advantages are divided by their standard deviation, in their group or in all (settings.scale_rewards), and their
    mean is 0: one below 0 would make every sampled token less likely, those of the tool call's form too, which nothing
    else holds in place.
    """
    scores = scores or [0.0] * len(episodes)
    earned = [
        np.array(rewards(episode, settings.reward, score)) for episode, score in zip(episodes, scores, strict=True)
    ]
    if settings.advantage in ("linear", "critic"):
        found = (critic or Critic()).advantages(episodes, earned, settings)
    else:
        of_group = {"return_to_go": return_to_go, "grpo": grpo, "gigpo": gigpo}[settings.advantage]
        found = []
        for start in range(0, len(episodes), settings.group_size):
            group = slice(start, start + settings.group_size)
            values = of_group(episodes[group], earned[group], settings)
            if settings.scale_rewards == "group":
                values = _divided(values)
            found += values
    if settings.scale_rewards == "batch":
        found = _divided(found)
    mean = np.concatenate(found).mean()
    return [values - mean for values in found]


def draw(
    advantages: np.ndarray, scores: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Places of `count` decisions in random order, and what stands for their advantages.

    scores: how long each decision's score is. A chance is in proportion to what the decision adds to the gradient, its
    advantage times its score (importance sampling by gradient norm, arXiv 1803.00942), but at most 1: none is drawn
    twice while others are left out (systematic sampling, Madow 1949). It is divided out again, so the mean over those
    drawn has the expectation of the mean over all.
    """
    whole, rest = divmod(count, len(advantages))
    sizes = np.abs(advantages) * scores + 1e-9
    chances, certain = sizes * rest / sizes.sum(), np.zeros(len(sizes), bool)
    while chances.max() > 1:
        certain |= chances >= 1
        others = sizes * (rest - certain.sum()) / sizes[~certain].sum()
        chances = np.where(certain, 1.0, others)
    marks = chances.cumsum()
    marks[-1] = rest  # but for rounding, it is
    times = whole + np.diff(np.floor(marks + generator.random()), prepend=0).astype(int)
    drawn = generator.permutation(np.repeat(np.arange(len(sizes)), times))
    return drawn, advantages[drawn] / (whole + chances[drawn]) * count / len(advantages)


def draw_decisions(
    episodes: Sequence[Episode], advantages: Sequence[np.ndarray], count: int, generator: np.random.Generator
) -> tuple[list[Step], np.ndarray]:
    """As many decisions as an iteration trains on, and what stands for their advantages: see `draw`.

    Their gradient is that of all decisions, with little noise added by the choice.
    """
    steps = [step for episode in episodes for step in episode.steps]
    scores = np.array([_score_length(step.reply.sample.logprobs) for step in steps])
    places, weights = draw(np.concatenate(advantages), scores, count, generator)
    return [steps[place] for place in places], weights


def _score_length(logprobs: Sequence[float]) -> float:
    """About the norm of the score, the gradient of a reply's log-probability: little if it could only be this reply.

    Not 0, for what has become less likely within the iteration.
    """
    return float(np.linalg.norm(1 - np.exp(logprobs))) + 0.05


def return_to_go(group: Sequence[Episode], earned: list[np.ndarray], settings: Rl) -> list[np.ndarray]:
    """The discounted return from a decision on, less its mean over the group at the same decision.

    An episode that has ended has nothing more to come. DeepSeekMath (arXiv 2402.03300) compares one outcome for each
    answer; an episode has hundreds of answers, and most come before what they lead to.
    """
    table = np.zeros((len(group), max(map(len, earned))))
    for row, values in zip(table, earned, strict=True):
        row[: len(values)] = returns(values.tolist(), settings.discount)
    table -= table.mean(axis=0)
    return [row[: len(values)] for row, values in zip(table, earned, strict=True)]


def grpo(group: Sequence[Episode], earned: list[np.ndarray], settings: Rl) -> list[np.ndarray]:
    """An episode's whole reward less the group's mean, for each of its decisions (GRPO, arXiv 2402.03300)."""
    totals = np.array([values.sum() for values in earned])
    return [np.full(len(values), total) for values, total in zip(earned, totals - totals.mean(), strict=True)]


def gigpo(group: Sequence[Episode], earned: list[np.ndarray], settings: Rl) -> list[np.ndarray]:
    """GiGPO (arXiv 2505.10978): the episode's advantage, as in GRPO, and that of a step among those at its anchor.

    Steps of a group's episodes that begin in the same state have the same anchor; the discounted returns from there on
    are compared with each other. Both parts have the group's, or anchor's, standard deviation divided out
    (equations 3, 6 and 8) and settings.anchor_weight is their ω. Pictures hardly ever repeat, so an anchor is what can
    be told of the state in words: see `anchor`.
    """
    totals = np.array([values.sum() for values in earned])
    totals = (totals - totals.mean()) / (totals.std() + 1e-6)
    found = [np.full(len(values), total) for values, total in zip(earned, totals, strict=True)]
    alike: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
    for place, episode in enumerate(group):
        for turn, step in enumerate(episode.steps):
            alike[anchor(step)].append((place, turn))
    to_go = [returns(values.tolist(), settings.discount) for values in earned]
    for members in alike.values():
        values = np.array([to_go[place][turn] for place, turn in members])
        values = (values - values.mean()) / (values.std() + 1e-6)
        for (place, turn), value in zip(members, values, strict=True):
            found[place][turn] += settings.anchor_weight * value
    return found


def anchor(step: Step) -> tuple:
    """What is owned, what is faced, whether a table and a furnace are near, and asleep or not."""
    now = step.observation
    column, row = VIEW[0] // 2 + now.facing[0], VIEW[1] // 2 + now.facing[1]
    around = now.view[VIEW[1] // 2 - 1 : VIEW[1] // 2 + 2, VIEW[0] // 2 - 1 : VIEW[0] // 2 + 2].ravel().tolist()
    near = tuple(sorted(_STATIONS & set(around)))
    return tuple(now.inventory.values()), int(now.view[row, column]), near, now.sleeping


class Critic:
    """A linear value function of the state with GAE, fitted by ridge regression and kept from iteration to iteration.

    The group's mean at the same decision is blind to what an episode has got already: who unlocks early has less to
    come than the others and is blamed for it. Here the values are a ridge regression of the discounted return (the
    linear feature baseline of Duan et al., arXiv 1604.06778), advantages are GAE's (Schulman et al., arXiv 1506.02438).
    With advantage `linear`, it's on features of the state (`features`); with `critic`, on the student's own last hidden
    state before it answers too: the turn-level critic of PPO for multi-turn agents (Odysseus, arXiv 2605.00347), which
    is as small as a critic can be, and is solved for rather than descended to.

    An episode is measured by the other groups' episodes and by earlier iterations, never by its own outcome. The
    penalty on hidden states, too, is chosen for each fold by the others alone: the one with the least error there.
    """

    def __init__(self, folder: Path | None = None, iteration: int = 0):
        """As the iteration before has left it in a folder; without one, it begins anew."""
        kept = folder and folder / f"{iteration - 1}.npy"
        self.sums: np.ndarray | None = np.load(kept) if kept and kept.exists() else None
        """(features + 1, features + 1): the second moments of all features and the return, earlier ones decayed."""

    def save(self, folder: Path, iteration: int) -> None:
        """Keep what this iteration has left, and forget what is older than two checkpoints."""
        if self.sums is not None:
            with replacing(folder / f"{iteration}.npy") as path, path.open("wb") as file:
                np.save(file, self.sums)
            (folder / f"{iteration - 3}.npy").unlink(missing_ok=True)

    def advantages(self, episodes: Sequence[Episode], earned: Sequence[np.ndarray], settings: Rl) -> list[np.ndarray]:
        """GAE's advantages for each decision, neither centred nor scaled; learns from these episodes."""
        totals = [np.array(returns(values.tolist(), settings.discount)) for values in earned]
        states = [features(episode, settings.max_steps) for episode in episodes]
        if settings.advantage == "critic":
            hidden = [np.stack([step.reply.sample.hidden for step in episode.steps]) for episode in episodes]
            states = [np.hstack(pair) for pair in zip(states, hidden, strict=True)]
        size = settings.group_size if len(episodes) > settings.group_size else 1
        parts = np.zeros((FOLDS, *(states[0].shape[1] + 1,) * 2))
        for index, pair in enumerate(zip(states, totals, strict=True)):
            row = np.column_stack(pair)
            parts[index // size % FOLDS] += row.T @ row
        before, known = self.sums, features(episodes[0], settings.max_steps).shape[1]
        learnt = parts.sum(axis=0) + (0.0 if before is None else FORGET * before)
        ridges = _ridges(learnt, parts, known) if settings.advantage == "critic" else [RIDGE] * FOLDS
        weights = [_ridge(learnt - part, ridge, known) for part, ridge in zip(parts, ridges, strict=True)]
        if before is not None and settings.value_clip:
            earlier = {ridge: _ridge(before, ridge, known) for ridge in set(ridges)}
            count = max(before[0, 0], 1.0)
            most = settings.value_clip * (before[-1, -1] / count - (before[0, -1] / count) ** 2) ** 0.5
        found = []
        for index, (values, state) in enumerate(zip(earned, states, strict=True)):
            fold = index // size % FOLDS
            value = state @ weights[fold]
            if before is not None and settings.value_clip:
                old = state @ earlier[ridges[fold]]
                value = np.clip(value, old - most, old + most)
            expected = np.append(value, 0.0)  # nothing comes after the end
            surprise = values + settings.discount * expected[1:] - expected[:-1]
            found.append(np.array(returns(surprise.tolist(), settings.discount * settings.gae_lambda)))
        self.sums = learnt
        return found


def features(episode: Episode, max_steps: int) -> np.ndarray:
    """(decisions, features): 1, the time left, what has been unlocked, and both together; vitals and inventory."""
    rows, unlocked = [], np.zeros(len(ACHIEVEMENTS))
    for step in episode.steps:
        now, left = step.observation, 1 - step.step / max_steps
        numbers = [*now.vitals.values(), *(min(count, 3) for count in now.inventory.values())]
        rows.append(
            np.concatenate([[1, left, left**2, now.sleeping, now.daylight], numbers, unlocked, unlocked * left])
        )
        unlocked[[ACHIEVEMENTS.index(name) for name in step.unlocked]] = 1
    return np.array(rows)


def _ridge(sums: np.ndarray, ridge: float, known: int) -> np.ndarray:
    """The weights of a ridge regression, from the second moments of features (the first is 1) and target.

    A weight is penalised by its feature's variance, as if all had been standardised: those of the first `known`
    features, which are no hidden states, by RIDGE, the others by `ridge`.
    """
    products, with_target = sums[:-1, :-1], sums[:-1, -1]
    count = max(products[0, 0], 1.0)
    variances = np.diag(products) / count - (products[0] / count) ** 2
    penalties = np.where(np.arange(len(products)) < known, RIDGE, ridge) * variances
    return np.linalg.solve(products + np.diag(penalties + 1e-3), with_target)


def _ridges(learnt: np.ndarray, parts: np.ndarray, known: int) -> list[float]:
    """For each fold the penalty of RIDGES that errs least on the other folds, each predicted without both.

    The first, unless another is better by more than MARGIN: with few groups, small differences are chance.
    """
    errors = np.zeros((FOLDS, len(RIDGES)))
    for one, other in combinations(range(FOLDS), 2):
        for place, ridge in enumerate(RIDGES):
            residual = np.append(_ridge(learnt - parts[one] - parts[other], ridge, known), -1.0)
            errors[one, place] += residual @ parts[other] @ residual
            errors[other, place] += residual @ parts[one] @ residual
    errors[:, 0] *= 1 - MARGIN
    return [RIDGES[place] for place in errors.argmin(axis=1)]


def _divided(found: list[np.ndarray]) -> list[np.ndarray]:
    scale = np.concatenate(found).std() + 1e-6
    return [values / scale for values in found]
