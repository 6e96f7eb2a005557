"""score: how the agents of the benchmark compare; metrics/benchmark.json, differences, statistics, plots.

    dvc repro score        or: python stages/score.py

metrics/benchmark.json has a row for each agent, metrics/statistics.json the 95 % interval of each figure, what the
figures can't support and whether they mean anything at all, metrics/differences.json every pair of agents on the worlds
both have played.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.stage import run, write_metrics, write_plot


def main() -> None:
    """Compare all agents of params.yaml."""
    settings = params.load()
    benchmark = settings.benchmark

    from apprentice import store
    from apprentice.results import score

    columns = ["seed", "step", "unlocked", "reward", "executed", "invalid"]
    files = {name: Path(f"data/benchmark/{name}.parquet") for name in benchmark.names}
    played = {name: score.summaries(store.columns(file, columns)) for name, file in files.items()}
    scores = {name: score.score(episodes, benchmark.bootstrap_samples) for name, episodes in played.items()}
    differences = score.compare_all(played, benchmark.bootstrap_samples)
    toy = settings.active.toy
    warnings = [f"profile {settings.profile} is for trying the code: its results mean nothing"] if toy else []
    warnings += [f"not by BALROG's rules: {what}" for what in settings.departures]
    warnings += score.warnings(scores, differences)
    intervals = {name: score.intervals(episodes, benchmark.bootstrap_samples) for name, episodes in played.items()}
    write_metrics("benchmark", scores)
    write_metrics("differences", differences)
    write_metrics("statistics", {"toy": toy, "intervals": intervals, "warnings": warnings})
    write_plot("achievements", ["agent", "achievement", "success"], achievements(scores))
    write_plot("agents", ["agent", "achievement_rate", "low", "high"], rates(scores))
    worlds = next(iter(scores.values()))["episodes"]
    print(f"score: {len(scores)} agents on {worlds} worlds; `apprentice results` shows them")


def achievements(scores: dict) -> list[list]:
    return [[agent, name, float(rate)] for agent, row in scores.items() for name, rate in row["achievements"].items()]


def rates(scores: dict) -> list[list]:
    rows = []
    for agent, row in scores.items():
        low, high = row["achievement_rate_ci95"]
        rows.append([agent, row["achievement_rate"], low, high])
    return rows


if __name__ == "__main__":
    run(main)
