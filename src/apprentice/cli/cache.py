"""`apprentice cache`: what is kept from run to run outside of DVC, and how to begin anew."""

import time
from pathlib import Path
from typing import Annotated

import typer

from apprentice.cache import cache_folder
from apprentice.errors import ConfigError
from apprentice.files import remove

KEPT = {
    "episodes": "what was played; a rerun plays only what is missing",
    "rows": "how long the rows of data/sft are",
    "sft": "checkpoints; a rerun goes on from the last, or takes up a finished one",
    "distill": "checkpoints and labels; likewise",
    "rl": "checkpoints, adapters and critics; likewise",
    "replies": "answers of models behind an API, and what they cost",
    "launch": "what machines were at work on",
    "serve": "adapters of servers that run",
}
PAID = ("replies", "launch")
"""What costs money to have again, or says where money is being spent."""
application = typer.Typer(help="What is kept from run to run, outside of DVC.", invoke_without_command=True)


@application.callback()
def show(context: typer.Context) -> None:
    """What is kept from run to run, outside of DVC, so that nothing is done or paid for twice.

    Example: apprentice cache
    """
    if context.invoked_subcommand:
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, title_justify="left")
    for name in ("kind", "entries", "MB", "newest", "what"):
        table.add_column(name, justify="right" if name in ("entries", "MB") else "left")
    for kind, what in KEPT.items():
        found = entries(kind)
        files = [file for entry in found for file in _files(entry)]
        if files:
            newest = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(file.stat().st_mtime for file in files)))
            size = sum(file.stat().st_size for file in files) / 1e6
            table.add_row(kind, str(len(found)), f"{size:,.1f}", newest, what)
    console = Console(highlight=False, soft_wrap=False)
    console.print(f"{cache_folder()}" + ("" if table.rows else " is empty"))
    if table.rows:
        console.print(table)
        console.print(
            "\nEntries are named by all that shaped them: settings, inputs, code, versions. So a changed setting finds "
            "none and begins anew, and the same again finds its own: `dvc repro -f -s sft` takes up the finished "
            "checkpoint. To train from nothing, clear it first:\n"
        )
        console.print("  apprentice cache clear sft\n  dvc repro -f -s sft")


@application.command()
def clear(
    kinds: Annotated[list[str], typer.Argument(help="What to remove: " + ", ".join(KEPT) + ".")],
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    paid: Annotated[
        bool, typer.Option("--paid", help="Also replies and launch, which cost money to have again.")
    ] = False,
) -> None:
    """Remove what is kept of these kinds; the next run does it again.

    No stage may be at work meanwhile. Results in data/, models/ and metrics/ stay as they are.

    Example: apprentice cache clear sft rl
    """
    if unknown := [kind for kind in kinds if kind not in KEPT]:
        raise ConfigError(f"there is nothing called {unknown[0]!r} in the cache; there are {', '.join(KEPT)}")
    if dear := [kind for kind in kinds if kind in PAID and not paid]:
        raise ConfigError(f"{dear[0]}: {KEPT[dear[0]]}; if you mean to lose that, add --paid")
    found = [entry for kind in kinds for entry in entries(kind)]
    if not found:
        print("nothing to remove")
        return
    size = sum(file.stat().st_size for entry in found for file in _files(entry)) / 1e6
    if not yes:
        typer.confirm(f"Remove {len(found)} entries, {size:,.1f} MB, from {cache_folder()}?", abort=True)
    for entry in found:
        remove(entry)
    print(f"removed {len(found)} entries, {size:,.1f} MB")


def entries(kind: str) -> list[Path]:
    """The files and folders of a kind."""
    folder = cache_folder() / kind
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _files(entry: Path) -> list[Path]:
    return [file for file in (entry.rglob("*") if entry.is_dir() else [entry]) if file.is_file()]
