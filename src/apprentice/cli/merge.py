"""`apprentice merge`: an adapter and its base as one model."""

from pathlib import Path
from typing import Annotated

import typer

from apprentice.errors import ConfigError


def merge_adapter(
    folders: Annotated[
        list[Path], typer.Argument(metavar="[ADAPTER] OUT", help="The adapter, if not models/rl; the folder to write.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of the base; otherwise the adapter's own, models/base, or what it names."
        ),
    ] = None,
) -> None:
    """Write an adapter merged into its base model, for what can't load adapters.

    Example: apprentice merge models/sft merged
    """
    if len(folders) > 2:
        raise ConfigError("apprentice merge takes an adapter and the folder to write, nothing more")
    adapter, out = folders if len(folders) == 2 else (Path("models/rl"), folders[0])

    from apprentice.student.merge import merge

    merge(adapter, out, base)
    print(f"{out}: {adapter} merged into its base; load it with AutoModelForImageTextToText, or vllm serve {out}")
