"""collect: one teacher plays Crafter on its seeds; data/traces/<teacher>.parquet, metrics/cost/<teacher>.json.

    dvc repro collect@expert                    or: python stages/collect.py expert
    python stages/collect.py expert --status    what there is already; plays nothing

Episodes go to the ledger as they end, and a paid teacher's replies as they come, so that a killed run continues, and
more seeds only add.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from apprentice import params
from apprentice.command import run, write_metrics


def main(
    name: str, status: Annotated[bool, typer.Option("--status", help="Say what there is; play nothing.")] = False
) -> None:
    """Play as the teacher NAME of params.yaml."""
    settings = params.load()
    if name not in settings.teachers:
        known = ", ".join(settings.teachers)
        raise params.ConfigError(f"params.yaml: teachers has no {name!r}; known there: {known}")
    teacher = settings.teachers[name]
    if status:
        show_status(name, teacher)
        raise typer.Exit
    if teacher.endpoint:
        from apprentice.client import api_key

        api_key(teacher.endpoint, f"teachers.{name}.endpoint")  # before anything else: it may be missing

    from apprentice import store

    trace = Path(f"data/traces/{name}.parquet")
    store.join(trace, episodes(name, teacher))
    totals = store.totals(trace)
    count = totals["episodes"]
    print(
        f"collect {name}: {count} episodes, {totals['decisions']} decisions ({totals['invalid']} invalid), "
        f"{totals['steps'] / count:.0f} steps and {totals['unlocked'] / count:.1f} achievements an episode"
    )
    write_cost(name, teacher, totals)


def episodes(name: str, teacher: params.Teacher) -> Iterator[bytes]:
    """The teacher's episodes (`store.to_bytes`) in the order of its seeds, from the ledger or played now."""
    from apprentice.ledger import code

    if teacher.endpoint:
        from apprentice import chat

        return chat.record(name, teacher, code(__file__))

    from apprentice import play
    from apprentice.policy import Scripted

    return play.record(
        Scripted,
        (teacher.policy, teacher.rationale),
        teacher.seeds,
        teacher.max_steps,
        teacher.prompt,
        fingerprint=scripted_run(name, teacher),
        agent=name,
        explore=teacher.explore,
    )


def scripted_run(name: str, teacher: params.Teacher) -> str:
    from apprentice.ledger import code, fingerprint

    return fingerprint(agent=name, teacher=teacher.model_dump(mode="json", exclude={"seeds"}), code=code(__file__))


def write_cost(name: str, teacher: params.Teacher, totals: dict[str, int]) -> None:
    """metrics/cost/<teacher>.json: tokens and dollars of the trace, and dollars spent for it and for all else."""
    cost = spent = 0.0
    if teacher.endpoint:
        from apprentice import chat

        cost, spent = chat.cost(name, teacher)
    dollars = {
        "cost_usd": cost,
        "cost_per_decision_usd": None if cost is None else cost / totals["decisions"],
        "cost_per_episode_usd": None if cost is None else cost / totals["episodes"],
        "spent_usd": spent,
    }
    dollars = {what: amount if amount is None else round(amount, 9) for what, amount in dollars.items()}
    write_metrics(f"cost/{name}", totals | dollars)


def show_status(name: str, teacher: params.Teacher) -> None:
    if teacher.endpoint:
        from apprentice import chat

        print(chat.status(name, teacher))
        return
    from apprentice.ledger import Ledger

    with Ledger(scripted_run(name, teacher)) as ledger:
        done = len(ledger.keys() & {str(seed) for seed in teacher.seeds})
    print(f"{name}: {done} of {len(teacher.seeds)} episodes done")


if __name__ == "__main__":
    run(main)
