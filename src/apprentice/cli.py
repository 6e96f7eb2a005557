"""The command `apprentice`: what is done by hand beside `dvc repro`."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from apprentice import params
from apprentice.command import WorkError, guarded

application = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Teach a vision-language model to play Crafter."
)


@application.command("import")
def add_imports(
    files: Annotated[list[Path], typer.Argument(help="JSONL in OpenAI's chat form, pictures as data: URLs.")],
    name: Annotated[str | None, typer.Option(help="What to call it; otherwise the file's name.")] = None,
) -> None:
    """Check chats of others and add them to params.yaml, beside the teachers.

    Example: apprentice import chats.jsonl --name friends
    """
    settings = params.load()
    if name and len(files) > 1:
        raise params.ConfigError("--name can name one file only; import the files one by one")
    named = {name or re.sub(r"[^A-Za-z0-9_-]+", "-", file.stem): file for file in files}
    if len(named) < len(files):
        raise params.ConfigError("two of the files have the same name; import them one by one, each with --name")
    for key, file in named.items():
        known = settings.imports.get(key)
        if known and Path(known.file) != file:
            raise params.ConfigError(f"imports has a {key!r} already ({known.file}); give another --name")
        if not file.is_file():
            raise params.ConfigError(f"there is no file {file}")
    extended = params.with_imports({key: str(file) for key, file in named.items()})

    from apprentice import imports

    for key, file in named.items():
        report = imports.Report()
        try:
            for _ in imports.read(file, key, report, settings.benchmark.seeds):
                pass
        except imports.NothingUsable as error:
            raise WorkError(f"{error}; params.yaml is as it was") from None
        print(f"{key}: {imports.summary(report)}")
    params.PATH.write_text(extended)
    print(f"added to {params.PATH}: now run dvc repro")


@application.command("estimate")
def show_estimate(
    as_json: Annotated[bool, typer.Option("--json", help="For a script: the same as JSON.")] = False,
) -> None:
    """What a run with params.yaml will take, stage by stage, and where each figure comes from.

    Example: apprentice estimate
    """
    settings = params.load()

    from apprentice.estimate import estimate

    found = estimate(settings)
    if as_json:
        print(json.dumps(found, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    def text(value: float | None, form: str) -> str:
        return "?" if value is None else format(value, form)

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
    console.print(f"together {found['gpu_hours']:.1f} GPU-hours, ${found['usd']:.2f}{lacking}")
    console.print("Times go from a third less to a third more than reckoned.\n\nHow each is known:")
    for line in found["stages"]:
        console.print(f"{line['stage']}: {line['how']}. From {'; '.join(line['sources'])}.", markup=False)


def main() -> None:
    guarded(application)
