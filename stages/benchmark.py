"""benchmark: every agent plays the same held-out worlds; metrics/benchmark.json, a table, and plots.

    dvc repro benchmark        or: python stages/benchmark.py

Episodes go to the ledger, so that only agents that have changed play again, and to data/benchmark/<agent>.parquet.
"""

import csv
from pathlib import Path

from apprentice import params
from apprentice.command import run, write_metrics

ADAPTERS = {"base": None, "sft": "models/sft", "rl": "models/rl"}


def main() -> None:
    """Benchmark all agents of params.yaml."""
    settings = params.load()
    benchmark = settings.benchmark

    from apprentice import score, store

    summaries = {}
    for agent in benchmark.agents:
        summaries[agent] = []

        def counted(episodes, found=summaries[agent]):
            for episode in episodes:
                found.append(score.summary(episode))
                yield episode

        store.write(Path(f"data/benchmark/{agent}.parquet"), counted(episodes(agent, settings)))

    scores = {agent: score.score(played, benchmark.bootstrap_samples) for agent, played in summaries.items()}
    agents = list(benchmark.agents)
    differences = {
        f"{better} - {worse}": score.compare(summaries[better], summaries[worse], benchmark.bootstrap_samples)
        for index, worse in enumerate(agents)
        for better in agents[index + 1 :]
    }
    plots = Path("metrics/plots")
    plots.mkdir(parents=True, exist_ok=True)
    write_metrics("benchmark", scores)
    write_metrics("differences", differences)
    with (plots / "achievements.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["agent", "achievement", "success"])
        for agent, row in scores.items():
            writer.writerows([agent, name, f"{rate:.6g}"] for name, rate in row["achievements"].items())
    show(scores, differences)


def episodes(agent: str, settings: params.Params):
    """The agent's episodes on the benchmark's seeds, from the ledger or played now."""
    from apprentice import play
    from apprentice.ledger import code, digest, fingerprint

    benchmark, profile = settings.benchmark, settings.student
    common = {"agent": agent, "max_steps": benchmark.max_steps, "code": code(__file__)}
    if agent not in ADAPTERS:
        from apprentice.policy import Scripted

        key = fingerprint(**common)
        return play.record(
            Scripted, (agent,), benchmark.seeds, benchmark.max_steps, params.Prompt(), fingerprint=key, agent=agent
        )
    from apprentice import local
    from apprentice.processes import cores

    sampling, adapter = profile.sampling, ADAPTERS[agent]
    together = sampling.batch_size
    folders = [Path("models/base"), *([Path(adapter)] if adapter else [])]
    key = fingerprint(
        **common,
        prompt=profile.prompt.model_dump(mode="json"),
        sampling=sampling.model_dump(mode="json"),
        dtype=profile.dtype,
        weights=[digest(folder) for folder in folders],
    )
    processes = min(cores(), -(-len(benchmark.seeds) // together))
    return play.record(
        local.load,
        (agent, adapter, profile.dtype, sampling.temperature, sampling.max_tokens, max(1, cores() // processes)),
        benchmark.seeds,
        benchmark.max_steps,
        profile.prompt,
        fingerprint=key,
        agent=agent,
        together=together,
    )


def show(scores: dict, differences: dict) -> None:
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
    console = Console(width=None)
    console.print(table)
    for pair in ("sft - base", "rl - sft"):
        if pair in differences:
            low, high = differences[pair]["ci95"]
            console.print(f"{pair}: {differences[pair]['difference']:+.1%} ({low:+.1%} to {high:+.1%}), same worlds")


if __name__ == "__main__":
    run(main)
