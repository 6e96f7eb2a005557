"""`apprentice import`: decisions of others, checked and added to params.yaml."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from apprentice import params
from apprentice.errors import ConfigError, WorkError


def add_imports(
    files: Annotated[
        list[Path], typer.Argument(help="JSONL in OpenAI's chat form, pictures as data: URLs, or traces.")
    ],
    name: Annotated[str | None, typer.Option(help="What to call it; otherwise the file's name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was found in each, for a script.")] = False,
) -> None:
    """Check decisions of others and add them to params.yaml, beside the teachers.

    A trace is a file of data/traces of another checkout. Replies that call other tools than ours need
    imports.NAME.tools in params.yaml first.

    Example: apprentice import chats.jsonl --name friends
    """
    settings = params.load()
    if name and len(files) > 1:
        raise ConfigError("--name can name one file only; import the files one by one")
    named = {name or re.sub(r"[^A-Za-z0-9_-]+", "-", file.stem): file for file in files}
    if len(named) < len(files):
        raise ConfigError("two of the files have the same name; import them one by one, each with --name")
    for key, file in named.items():
        known = settings.imports.get(key)
        if known and Path(known.file) != file:
            raise ConfigError(f"imports has a {key!r} already ({known.file}); give another --name")
        if not file.is_file():
            raise ConfigError(f"there is no file {file}")
    extended = params.with_imports({key: str(file) for key, file in named.items()})

    from apprentice.data import imports

    reports = {key: imports.Report() for key in named}
    for key, file in named.items():
        report = reports[key]
        try:
            tools = settings.imports[key].tools if key in settings.imports else {}
            for _ in imports.read(file, key, report, settings.held_out, tools):
                pass
        except imports.NothingUsable as error:
            raise WorkError(f"{error}; params.yaml is as it was") from None
        if not as_json:
            print(f"{key}: {imports.summary(report)}")
            if report.pictures["without"] and settings.active.prompt.mode != "text":
                print(f"{key}: the student of profile {settings.profile} plays by the picture, which those lack")
    params.PATH.write_text(extended)
    if as_json:
        print(json.dumps({key: report.as_dict() for key, report in reports.items()}))
    else:
        print(f"added to {params.PATH}: now run dvc repro")
