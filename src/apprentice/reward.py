"""What reinforcement learning rewards."""

from apprentice.episode import Episode
from apprentice.params import Reward


def rewards(episode: Episode, weights: Reward) -> list[float]:
    """The reward of each decision: newly unlocked achievements, health gained or lost, invalid replies."""
    return [
        weights.unlock * len(step.unlocked) + weights.health * step.health_change + weights.invalid * bool(step.invalid)
        for step in episode.steps
    ]


def returns(values: list[float], discount: float) -> list[float]:
    """The discounted sum of this and all later rewards, for each decision."""
    found, total = [], 0.0
    for value in reversed(values):
        total = value + discount * total
        found.append(total)
    return found[::-1]
