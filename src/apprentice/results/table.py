"""The results in a terminal of 80 columns: how the agents did, where the time went, what to do next."""

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from apprentice import store
from apprentice.params import Params
from apprentice.progress import duration
from apprentice.results import score
from apprentice.stage import read_metrics

WIDTH = 80
PAIRS = ("sft - base", "distill - sft", "rl - distill")
_NOTES = 3
_PLAYED = ["seed", "step", "unlocked", "reward", "executed", "invalid"]


def show(settings: Params) -> None:
    """Print it all, of what is in metrics/ and data/benchmark. Raises FileNotFoundError for what has not been made."""
    console = Console(width=WIDTH, highlight=False)
    scores, statistics = read_metrics("benchmark"), read_metrics("statistics")
    console.print(agents(scores, before := committed()))
    if before:
        console.print("as committed: metrics/summary.json in git's HEAD, of which README's table is\n")
    for line in compared(read_metrics("differences")):
        console.print(line, markup=False)
    first, others = statistics["warnings"][:_NOTES], statistics["warnings"][_NOTES:]
    for warning in first:
        console.print(f"note: {warning}", markup=False)
    if others:
        console.print(f"and {len(others)} more notes, in metrics/report.html")
    console.print(time(seconds()))
    console.print("\nwhat next")
    for command, why in following(settings):
        console.print(f"  {command}\n      {why}", markup=False, soft_wrap=True)


def agents(scores: dict, before: dict[str, float]) -> Table:
    """A row for each agent. before: achievement rates in percent as committed, which are README's."""
    columns = ["agent", "achievement\nrate", "95%\ninterval", "Crafter\nscore", "reward", "steps", "invalid\nreplies"]
    if before:
        columns.insert(3, "as com-\nmitted")
    worlds = next(iter(scores.values()))["episodes"]
    table = Table(box=None, title=f"results on {worlds} held-out worlds", title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "agent" else "right", no_wrap=name != "agent")
    for agent, row in scores.items():
        low, high = row["achievement_rate_ci95"]
        cells = [
            agent,
            f"{row['achievement_rate']:.1%}",
            f"{100 * low:.1f} to {high:.1%}",
            f"{row['crafter_score']:.1f}",
            f"{row['reward']:.2f}",
            f"{row['steps_mean']:.0f}",
            f"{row['invalid_rate']:.1%}",
        ]
        if before:
            cells.insert(3, f"{before[agent]:.1f}%" if agent in before else "")
        table.add_row(*cells)
    return table


def compared(differences: dict) -> Iterator[str]:
    """What each step of training has brought, on the same worlds."""
    for pair in PAIRS:
        if pair in differences:
            row = differences[pair]
            low, high = (100 * bound for bound in row["ci95"])
            yield (
                f"{pair.replace(' - ', ' minus ')}: {100 * row['difference']:+.1f} points ({low:+.1f} to {high:+.1f}), "
                f"p = {row['p_holm']:.2g}"
            )


def committed() -> dict[str, float]:
    """The achievement rates, in percent, of metrics/summary.json in git's HEAD; none without one."""
    done = subprocess.run(["git", "show", "HEAD:./metrics/summary.json"], capture_output=True, text=True)
    return json.loads(done.stdout)["achievement_rate"] if done.returncode == 0 else {}


def seconds() -> Counter[str]:
    """How long each stage took when it last ran, all of its kind together."""
    found: Counter[str] = Counter()
    for file in Path("metrics/times").glob("*.json"):
        found[file.stem.partition("-")[0]] += json.loads(file.read_text())["seconds"]
    return found


def time(spent: Counter[str]) -> Table:
    """Where it went: the longest, and all else."""
    whole = max(spent.total(), 1e-9)
    long = [(name, seconds) for name, seconds in spent.most_common() if seconds / whole >= 0.03]
    rest = whole - sum(seconds for _, seconds in long)
    table = Table(box=None, show_header=False, title="\nwhere the time went", title_justify="left")
    for name, seconds in [*long, *([("all else", rest)] if rest / whole >= 0.005 else [])]:
        table.add_row(name, duration(seconds), f"{seconds / whole:.0%}", "█" * round(30 * seconds / whole))
    table.add_row("together", duration(whole))
    for column in table.columns[1:3]:
        column.justify = "right"
    return table


def best(agent: str) -> int:
    """The seed of the benchmark's world on which the agent did best: by achievements, then by reward."""
    played = score.summaries(store.columns(Path(f"data/benchmark/{agent}.parquet"), _PLAYED))
    return max(played, key=lambda one: (len(one.unlocked), one.reward, -one.seed)).seed


def following(settings: Params) -> list[tuple[str, str]]:
    """Commands, and what each is for."""
    commands = [("metrics/report.html", "open it in a browser: curves, achievements, and what each agent did")]
    if settings.benchmark.students:
        agent = list(settings.benchmark.students)[-1]
        commands.append((f"apprentice play {agent} --seed {best(agent)}", "watch it on the world where it did best"))
    rate = settings.active.rl.learning_rate
    commands.append(
        (
            f"dvc exp run -S profiles.{settings.profile}.rl.learning_rate={rate / 2:g}",
            "an experiment: half the learning rate; `dvc exp show` has it beside this",
        )
    )
    return commands
