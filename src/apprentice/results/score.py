"""How well agents play: achievement rate, Crafter score, reward; what chance may have done, and what it can't have."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil

import numpy as np
from scipy.stats import binomtest, bootstrap, permutation_test

from apprentice.episode import Episode
from apprentice.world.observation import ACHIEVEMENTS

FEW = 10
"""With fewer episodes no interval is to be trusted: a bootstrap can't know what none of them has shown."""
_LEVEL, _POWER = 1.96, 0.84
"""Normal quantiles of a 5 % two-sided test, and of finding in 80 % of attempts what is there."""
_FEWEST = 6
"""With fewer worlds no signs at all make the permutation test's p less than 5 %: 2 / 2^5 is 6.25 %."""


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


def summaries(rows: Iterable[dict]) -> list[Summary]:
    """The same from a table's rows: seed, step, unlocked, reward, executed, invalid of each decision."""
    found: dict[int, list[dict]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(row)
    return [
        Summary(
            seed,
            frozenset(name for row in played for name in row["unlocked"]),
            sum(row["reward"] for row in played),
            played[-1]["step"] + len(played[-1]["executed"]),
            len(played),
            sum(bool(row["invalid"]) for row in played),
        )
        for seed, played in found.items()
    ]


def score(episodes: Sequence[Summary], samples: int = 10_000) -> dict:
    """The row of `metrics/benchmark.json` for one agent.

    achievement_rate: unlocked / 22 per episode, averaged (BALROG's progression); its 95 % interval is a bootstrap over
    episodes. crafter_score: exp(mean_i ln(1 + s_i)) - 1 with the success rates s_i in percent (Hafner 2021, eq. 1).
    """
    rates = np.array([len(episode.unlocked) / len(ACHIEVEMENTS) for episode in episodes])
    success = _unlocks(episodes).mean(axis=0)
    return {
        "achievement_rate": float(rates.mean()),
        "achievement_rate_ci95": interval(rates, samples),
        "crafter_score": float(_crafter_score(success)),
        "reward": float(np.mean([episode.reward for episode in episodes])),
        "episodes": len(episodes),
        "steps_mean": float(np.mean([episode.length for episode in episodes])),
        "invalid_rate": float(_invalid_rate(*_invalid(episodes))),
        "achievements": dict(zip(ACHIEVEMENTS, success.tolist(), strict=True)),
    }


def intervals(episodes: Sequence[Summary], samples: int = 10_000) -> dict:
    """The 95 % interval of every metric of `score`: bootstrapped over episodes, Wilson's for each achievement."""
    unlocks, count = _unlocks(episodes), len(episodes)
    return {
        "achievement_rate": interval(unlocks.mean(axis=1), samples),
        "crafter_score": _interval((unlocks,), lambda part, axis: _crafter_score(part.mean(axis=0)), samples),
        "reward": interval(np.array([episode.reward for episode in episodes]), samples),
        "steps_mean": interval(np.array([float(episode.length) for episode in episodes]), samples),
        "invalid_rate": _interval(_invalid(episodes), lambda *parts, axis: _invalid_rate(*parts), samples),
        "achievements": {
            name: list(map(float, binomtest(int(times), count).proportion_ci(method="wilson")))
            for name, times in zip(ACHIEVEMENTS, unlocks.sum(axis=0), strict=True)
        },
    }


def compare(one: Sequence[Summary], other: Sequence[Summary], samples: int = 10_000) -> dict:
    """one minus other in achievement rate, episode by episode on the same seeds, with a 95 % bootstrap interval.

    p is a paired permutation test's (signs of the differences flipped, two-sided). needed: how many worlds would show
    a difference of this size in four of five attempts, None where there is none.
    """
    second = {episode.seed: len(episode.unlocked) for episode in other}
    pairs = [len(episode.unlocked) - second[episode.seed] for episode in one if episode.seed in second]
    differences = np.array(pairs) / len(ACHIEVEMENTS)
    mean, spread = float(differences.mean()), float(differences.std(ddof=1)) if len(pairs) > 1 else 0.0
    return {
        "difference": mean,
        "ci95": interval(differences, samples),
        "pairs": len(pairs),
        "better": int((differences > 0).sum()),
        "worse": int((differences < 0).sum()),
        "p": _paired_p(differences, samples),
        "needed": max(_FEWEST, ceil(((_LEVEL + _POWER) * spread / mean) ** 2)) if mean and spread else None,
    }


def compare_all(played: dict[str, Sequence[Summary]], samples: int = 10_000) -> dict[str, dict]:
    """Every later agent minus every earlier one: {"rl - sft": compare(…)}, with p_holm, p corrected for their number.

    Holm 1979: of m tests the k-th smallest p counts (m - k + 1) times, and never less than one before it.
    """
    found = {
        f"{better} - {worse}": compare(played[better], played[worse], samples)
        for worse, better in combinations(played, 2)
    }
    least = 0.0
    for rank, pair in enumerate(sorted(found, key=lambda pair: found[pair]["p"])):
        least = max(least, min(1.0, (len(found) - rank) * found[pair]["p"]))
        found[pair]["p_holm"] = least
    return found


def warnings(scores: dict[str, dict], differences: dict[str, dict]) -> list[str]:
    """What these numbers can't support, each in a sentence: too few episodes, or too small a difference for them."""
    few = {agent: row["episodes"] for agent, row in scores.items() if row["episodes"] < FEW}
    if few and len(few) == len(scores):
        return [
            f"{max(few.values())} worlds are too few for any interval or difference to be trusted; play {FEW} or more"
        ]
    found = [
        f"{agent}: {episodes} episodes are too few for its interval to be trusted; play {FEW} or more"
        for agent, episodes in few.items()
    ]
    for pair, row in differences.items():
        low, high = row["ci95"]
        if row["p_holm"] < 0.05 or not row["pairs"]:
            continue
        better, worse = pair.split(" - ")
        text = f"{better} and {worse} can't be told apart on {row['pairs']} worlds: {100 * row['difference']:+.1f} "
        text += f"percentage points, {100 * low:+.1f} to {100 * high:+.1f}, p = {row['p_holm']:.2g}"
        if row["p"] < 0.05:
            text += f" once corrected for {len(differences)} comparisons"
        if row["needed"]:
            text += f"; if that's the difference, about {row['needed']:,} would show it"
        found.append(text)
    return found


def interval(values: np.ndarray, samples: int) -> list[float]:
    """The 95 % percentile bootstrap interval of the mean, from a fixed seed."""
    if len(values) < 2 or np.ptp(values) == 0:
        return [float(values.mean())] * 2
    found = bootstrap(
        (values,), np.mean, n_resamples=samples, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return [float(found.low), float(found.high)]


def _interval(columns: tuple[np.ndarray, ...], statistic: Callable, samples: int) -> list[float]:
    """The same for a statistic of whole episodes: columns have a row for each, drawn together."""
    count, generator = len(columns[0]), np.random.default_rng(0)
    drawn = (generator.integers(count, size=count) for _ in range(samples))
    values = [statistic(*(column[rows] for column in columns), axis=0) for rows in drawn]
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


def _paired_p(differences: np.ndarray, samples: int) -> float:
    if len(differences) < 2 or not differences.any():
        return 1.0
    test = permutation_test(
        (differences,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=samples,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def _unlocks(episodes: Sequence[Summary]) -> np.ndarray:
    """bool, (episodes, 22)."""
    return np.array([[name in episode.unlocked for name in ACHIEVEMENTS] for episode in episodes])


def _crafter_score(success: np.ndarray) -> float:
    return np.expm1(np.log1p(100 * success).mean())


def _invalid(episodes: Sequence[Summary]) -> tuple[np.ndarray, np.ndarray]:
    columns = ([episode.invalid for episode in episodes], [episode.decisions for episode in episodes])
    return np.array(columns[0]), np.array(columns[1])


def _invalid_rate(invalid: np.ndarray, decisions: np.ndarray) -> float:
    return invalid.sum() / max(1, decisions.sum())
