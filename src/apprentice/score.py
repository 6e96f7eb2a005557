"""How well agents play: achievement rate, Crafter score, reward, with bootstrap intervals; agents compared by seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from apprentice.episode import Episode
from apprentice.world import ACHIEVEMENTS


@dataclass(frozen=True)
class Summary:
    """What an episode's score needs of it; small, so that any number fit into memory."""

    seed: int
    unlocked: frozenset[str]
    reward: float
    length: int
    decisions: int
    invalid: int


def summary(episode: Episode) -> Summary:
    invalid = sum(bool(step.invalid) for step in episode.steps)
    return Summary(
        episode.seed, frozenset(episode.unlocked), episode.reward, episode.length, len(episode.steps), invalid
    )


def score(episodes: Sequence[Summary], samples: int = 10_000) -> dict:
    """The row of `metrics/benchmark.json` for one agent.

    achievement_rate: unlocked / 22 per episode, averaged (BALROG's progression); its 95 % interval is a bootstrap over
    episodes. crafter_score: exp(mean_i ln(1 + s_i)) - 1 with the success rates s_i in percent (Hafner 2021, eq. 1).
    """
    rates = np.array([len(episode.unlocked) / len(ACHIEVEMENTS) for episode in episodes])
    success = {name: float(np.mean([name in episode.unlocked for episode in episodes])) for name in ACHIEVEMENTS}
    decisions = sum(episode.decisions for episode in episodes)
    return {
        "achievement_rate": float(rates.mean()),
        "achievement_rate_ci95": interval(rates, samples),
        "crafter_score": float(np.exp(np.mean(np.log1p(100 * np.array(list(success.values()))))) - 1),
        "reward": float(np.mean([episode.reward for episode in episodes])),
        "episodes": len(episodes),
        "steps_mean": float(np.mean([episode.length for episode in episodes])),
        "invalid_rate": sum(episode.invalid for episode in episodes) / decisions if decisions else 0.0,
        "achievements": success,
    }


def compare(one: Sequence[Summary], other: Sequence[Summary], samples: int = 10_000) -> dict:
    """one minus other in achievement rate, episode by episode on the same seeds, with a 95 % bootstrap interval."""
    second = {episode.seed: len(episode.unlocked) for episode in other}
    pairs = [len(episode.unlocked) - second[episode.seed] for episode in one if episode.seed in second]
    differences = np.array(pairs) / len(ACHIEVEMENTS)
    return {"difference": float(differences.mean()), "ci95": interval(differences, samples), "pairs": len(pairs)}


def interval(values: np.ndarray, samples: int) -> list[float]:
    """The 95 % percentile bootstrap interval of the mean, from a fixed seed."""
    if len(values) < 2 or np.ptp(values) == 0:
        return [float(values.mean())] * 2
    found = bootstrap(
        (values,), np.mean, n_resamples=samples, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return [float(found.low), float(found.high)]
