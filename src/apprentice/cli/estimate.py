"""`apprentice estimate`: what a run will take."""

import json
from pathlib import Path
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

    found = estimate(settings, places, Path.cwd())
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
        size, unit, form = (1, "h", ".1f") if high >= 1 else (60, "min", ".0f") if high > 1 / 60 else (3600, "s", ".0f")
        return f"{low * size:{form}} to {high * size:{form}} {unit}"

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
    console.print(
        f"{time(found['hours'])} together, {text(found['gpu_hours'], '.1f')} GPU-hours, "
        f"${text(found['usd'], '.2f')}{lacking}"
    )
    console.print(
        "What has run here before, or was measured on such a card, is given from a third less to a third more; what "
        "another processor took, from a third less to twice as long.\n\nHow each is known:"
    )
    for line in found["stages"]:
        console.print(f"{line['stage']}: {line['how']}. From {'; '.join(line['sources'])}.", markup=False)
