"""What reinforcement learning rewards."""

from collections.abc import Sequence

from apprentice.episode import Episode
from apprentice.params import Reward


def rewards(episode: Episode, weights: Reward, score: float = 0.0) -> list[float]:
    """The reward of each decision: newly unlocked achievements, health gained or lost, invalid replies.

    score: the judge's, for the last decision.
    """
    found = [
        weights.unique * sum(weights.achievements.get(name, 1.0) for name in step.unlocked)
        + weights.stepwise * bool(step.unlocked)
        + weights.health * step.health_change
        + weights.invalid * bool(step.invalid)
        for step in episode.steps
    ]
    found[-1] += weights.judge * score
    return found


def with_mean(scores: Sequence[float | None]) -> list[float]:
    """A group's scores, those that are missing replaced by the mean of the others: neither praise nor blame."""
    known = [score for score in scores if score is not None]
    mean = sum(known) / len(known) if known else 0.0
    return [mean if score is None else score for score in scores]


def returns(values: list[float], discount: float) -> list[float]:
    """The discounted sum of this and all later rewards, for each decision."""
    found, total = [], 0.0
    for value in reversed(values):
        total = value + discount * total
        found.append(total)
    return found[::-1]
