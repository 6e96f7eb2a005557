"""collect: one teacher plays Crafter on its seeds; data/traces/<teacher>.parquet, metrics/cost/<teacher>.json.

    dvc repro collect@expert                    or: python stages/collect.py expert
    python stages/collect.py expert --status    what there is already; plays nothing

Episodes go to the ledger as they end, and a paid teacher's replies as they come, so that a killed run continues, and
more seeds only add.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.errors import ConfigError
from apprentice.stage import run, write_metrics


def main(
    name: str, status: Annotated[bool, typer.Option("--status", help="Say what there is; play nothing.")] = False
) -> None:
    """Play as the teacher NAME of params.yaml."""
    teachers = params.load().teachers
    if name not in teachers:
        raise ConfigError(f"params.yaml: teachers has no {name!r}; known there: {', '.join(teachers)}")
    teacher = teachers[name]
    if status:
        print(what_there_is(name, teacher))
        raise typer.Exit
    if teacher.endpoint:
        from apprentice.endpoint.client import api_key

        api_key(teacher.endpoint, whose(name))  # before anything else: it may be missing

    from apprentice import store

    trace = Path(f"data/traces/{name}.parquet")
    store.join(trace, episodes(name, teacher))
    totals = store.totals(trace)
    count = totals["episodes"]
    print(
        f"collect {name}: {count} episodes, {totals['decisions']} decisions ({totals['invalid']} invalid), "
        f"{totals['steps'] / count:.0f} steps and {totals['unlocked'] / count:.1f} achievements an episode, in {trace}"
    )
    write_metrics(f"cost/{name}", totals | cost(name, teacher, totals))


def spec(name: str, teacher: params.Teacher):
    """What the teacher is to play. A scripted one's episodes are known by all that shapes them; a paid one's are named
    in players.chat, by what its endpoint is asked."""
    from apprentice.fingerprint import code, fingerprint
    from apprentice.play import Spec

    key = ""
    if teacher.endpoint is None:
        shaping = teacher.model_dump(mode="json", exclude={"seeds"})
        key = fingerprint(agent=name, teacher=shaping, code=code(__file__, players=[teacher.policy]))
    return Spec(
        *(teacher.seeds, teacher.max_steps, teacher.prompt, name),
        explore=teacher.explore,
        fingerprint=key,
        max_calls=teacher.max_calls,
    )


def episodes(name: str, teacher: params.Teacher) -> Iterator[bytes]:
    """The teacher's episodes (`store.to_bytes`) in the order of its seeds, kept from before or played now."""
    if teacher.endpoint:
        from apprentice.fingerprint import code
        from apprentice.players import chat

        made_by = code(__file__, players=[teacher.policy])
        return chat.record(spec(name, teacher), teacher.endpoint, made_by, whose(name))

    from apprentice.play import record
    from apprentice.players.scripted import Scripted

    return record(Scripted, (teacher.policy, teacher.rationale), spec(name, teacher))


def whose(name: str) -> str:
    """Where the endpoint's settings stand, for error messages."""
    return f"teachers.{name}.endpoint"


def cost(name: str, teacher: params.Teacher, totals: dict[str, int]) -> dict[str, float | None]:
    """Dollars of the trace, and those spent for it and for all else; None where a price is not known."""
    paid = spent = 0.0
    if teacher.endpoint:
        from apprentice.players import chat

        paid, spent = chat.cost(spec(name, teacher), teacher.endpoint)
    dollars = {
        "cost_usd": paid,
        "cost_per_decision_usd": None if paid is None else paid / totals["decisions"],
        "cost_per_episode_usd": None if paid is None else paid / totals["episodes"],
        "spent_usd": spent,
    }
    return {what: amount if amount is None else round(amount, 9) for what, amount in dollars.items()}


def what_there_is(name: str, teacher: params.Teacher) -> str:
    """How many of the episodes have been played, in a few lines."""
    if teacher.endpoint:
        from apprentice.players import chat

        return chat.status(spec(name, teacher), teacher.endpoint)
    from apprentice.ledger import Ledger

    with Ledger(spec(name, teacher).fingerprint) as ledger:
        done = len(ledger.keys() & {str(seed) for seed in teacher.seeds})
    return f"{name}: {done} of {len(teacher.seeds)} episodes done"


if __name__ == "__main__":
    run(main)
