"""summary: the few figures that `dvc metrics diff` and `dvc exp show` have a column for; metrics/summary.json.

dvc repro summary        or: python stages/summary.py
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice.stage import read_metrics, run, write_metrics


def main() -> None:
    """Write metrics/summary.json: achievement rates in percent, and how data and training went."""
    names = ("benchmark", "statistics", "filter", "sft", "distill", "rl")
    benchmark, statistics, filtered, sft, distill, rl = map(read_metrics, names)
    summary: dict = {"meaningless": True} if statistics["toy"] else {}
    summary |= {
        "kept_decisions": filtered["decisions"]["kept"],
        "achievement_rate": {name: round(100 * row["achievement_rate"], 3) for name, row in benchmark.items()},
        "sft_val_loss": rounded(sft["val_loss"], 4),
        "sft_agreement": rounded(agreement(), 4),
        "distill_agreement": rounded(distill["rounds"][-1]["agreement"], 4) if distill["rounds"] else None,
        "rl_held_out_reward": round(rl["held_out_best_reward"], 3),
    }
    write_metrics("summary", summary)
    print("summary: " + ", ".join(f"{name} {rate:.1f}%" for name, rate in summary["achievement_rate"].items()))


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def agreement() -> float | None:
    """Share of held-out decisions in which the SFT student answers what the teacher did; None if none was held out."""
    with Path("metrics/plots/agreement.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return sum(row["teacher"] == row["student"] for row in rows) / len(rows) if rows else None


if __name__ == "__main__":
    run(main)
