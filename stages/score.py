"""score: how the agents of the benchmark compare; metrics/benchmark.json, differences, statistics, a table, plots.

    dvc repro score        or: python stages/score.py

metrics/benchmark.json has a row for each agent, metrics/statistics.json the 95 % interval of each figure in it and what
the figures can't support, metrics/differences.json every pair of agents on the worlds both have played.
metrics/summary.json is the little of all that which `dvc exp show` has a column for.
"""

import csv
import json
from pathlib import Path

from apprentice import params
from apprentice.command import run, write_metrics


def main() -> None:
    """Compare all agents of params.yaml."""
    settings = params.load()
    benchmark = settings.benchmark

    from apprentice import score, store

    columns = ["seed", "step", "unlocked", "reward", "executed", "invalid"]
    files = {name: Path(f"data/benchmark/{name}.parquet") for name in benchmark.names}
    played = {name: score.summaries(store.columns(file, columns)) for name, file in files.items()}
    scores = {name: score.score(episodes, benchmark.bootstrap_samples) for name, episodes in played.items()}
    differences = score.compare_all(played, benchmark.bootstrap_samples)
    warnings = score.warnings(scores, differences)
    intervals = {name: score.intervals(episodes, benchmark.bootstrap_samples) for name, episodes in played.items()}
    write_metrics("benchmark", scores)
    write_metrics("differences", differences)
    write_metrics("statistics", {"intervals": intervals, "warnings": warnings})
    write_metrics("summary", summary(scores))
    write_plot("achievements", ["agent", "achievement", "success"], achievements(scores))
    write_plot("agents", ["agent", "achievement_rate", "low", "high"], rates(scores))
    show(scores, differences, warnings)


def summary(scores: dict) -> dict:
    """Each agent's achievement rate in percent; of the data and the training what says how it went."""
    filtered, sft, rl = (json.loads(Path(f"metrics/{name}.json").read_text()) for name in ("filter", "sft", "rl"))
    return {
        "kept_decisions": filtered["decisions"]["kept"],
        "achievement_rate": {name: round(100 * row["achievement_rate"], 2) for name, row in scores.items()},
        "sft_val_loss": round(sft["val_loss"], 4),
        "sft_agreement": agreement(),
        "rl_held_out_reward": round(rl["held_out_best_reward"], 3),
    }


def agreement() -> float:
    """Share of held-out decisions in which the SFT student answers what the teacher did."""
    with Path("metrics/plots/agreement.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return round(sum(row["teacher"] == row["student"] for row in rows) / len(rows), 4)


def achievements(scores: dict) -> list[list]:
    return [[agent, name, f"{rate:.6g}"] for agent, row in scores.items() for name, rate in row["achievements"].items()]


def rates(scores: dict) -> list[list]:
    rows = []
    for agent, row in scores.items():
        low, high = row["achievement_rate_ci95"]
        rows.append([agent, *(f"{value:.6g}" for value in (row["achievement_rate"], low, high))])
    return rows


def write_plot(name: str, columns: list[str], rows: list[list]) -> None:
    """Write metrics/plots/<name>.csv, which DVC draws."""
    path = Path(f"metrics/plots/{name}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def show(scores: dict, differences: dict, warnings: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ["agent", "achievement rate", "95 % interval", "Crafter score", "reward", "steps", "invalid"]
    table = Table(*columns, title=f"{next(iter(scores.values()))['episodes']} held-out worlds")
    for agent, row in scores.items():
        low, high = row["achievement_rate_ci95"]
        table.add_row(
            agent,
            f"{row['achievement_rate']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{row['crafter_score']:.1f}",
            f"{row['reward']:.2f}",
            f"{row['steps_mean']:.0f}",
            f"{row['invalid_rate']:.1%}",
        )
    console = Console(width=None, highlight=False)
    console.print(table)
    for pair in ("sft - base", "rl - sft"):
        if pair in differences:
            row = differences[pair]
            low, high = row["ci95"]
            console.print(
                f"{pair}: {row['difference']:+.1%} ({low:+.1%} to {high:+.1%}), p = {row['p_holm']:.2g}, "
                f"better on {row['better']} of {row['pairs']} worlds, worse on {row['worse']}"
            )
    for warning in warnings:
        console.print(f"note: {warning}", markup=False)


if __name__ == "__main__":
    run(main)
