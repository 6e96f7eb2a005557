"""`apprentice estimate`: what a run will take."""

import json
from typing import Annotated

import typer

from apprentice import compute, params


def show_estimate(
    as_json: Annotated[bool, typer.Option("--json", help="For a script: the same as JSON.")] = False,
) -> None:
    """What a run with params.yaml will take, stage by stage, and where each figure comes from.

    Example: apprentice estimate
    """
    settings, places = params.load(), compute.load()

    from apprentice.cloud.estimate import estimate

    found = estimate(settings, places)
    if as_json:
        print(json.dumps(found, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    def text(value: tuple[float, float] | None, form: str) -> str:
        low, high = ("?", "?") if value is None else (format(bound, form) for bound in value)
        return low if low == high else f"{low} to {high}"

    def time(hours: tuple[float, float] | None) -> str:
        if hours is None:
            return "?"
        low, high = hours
        return f"{low:.1f} to {high:.1f} h" if high >= 1 else f"{low * 60:.1f} to {high * 60:.1f} min"

    columns = ("stage", "decisions", "M tokens", "time", "GPUs", "GPU-hours", "$")
    table = Table(*columns, box=None, title=f"profile {found['profile']}, from nothing")
    for line in found["stages"]:
        table.add_row(
            line["stage"],
            "" if line["decisions"] is None else f"{line['decisions']:,}",
            "" if line["tokens"] is None else f"{line['tokens'] / 1e6:.1f}",
            time(line["hours"]),
            str(line["gpus"] or ""),
            text(line["gpu_hours"], ".1f"),
            text(line["usd"], ".2f"),
        )
    lacking = f" and what is not known ({', '.join(found['unknown'])})" if found["unknown"] else ""
    console = Console(highlight=False)
    console.print(table)
    console.print(f"together {text(found['gpu_hours'], '.1f')} GPU-hours, ${text(found['usd'], '.2f')}{lacking}")
    console.print("A measured time goes from a third less to a third more.\n\nHow each is known:")
    for line in found["stages"]:
        console.print(f"{line['stage']}: {line['how']}. From {'; '.join(line['sources'])}.", markup=False)
