"""import: the decisions of others, OpenAI-format JSONL or a trace, become one more trace beside the teachers'.

    dvc repro import@NAME        or: python stages/import.py NAME

What can't be used is counted, with the reason, in metrics/imports/NAME.json. What others have paid isn't known:
metrics/cost/NAME.json says null, where a teacher's has dollars.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.errors import ConfigError, WorkError
from apprentice.stage import run, write_metrics


def main(name: str) -> None:
    """Read the import NAME of params.yaml."""
    settings = params.load()
    if name not in settings.imports:
        known = ", ".join(settings.imports) or "nothing"
        raise ConfigError(f"params.yaml: imports has no {name!r}; known there: {known}")
    source = settings.imports[name]
    path = Path(source.file)
    if not path.is_file():
        raise ConfigError(f"params.yaml: imports.{name}.file: there is no file {path}")

    from apprentice import store
    from apprentice.data import imports

    report = imports.Report()
    episodes = imports.read(path, name, report, settings.held_out, source.tools)
    try:
        store.write(Path(f"data/traces/{name}.parquet"), episodes)
    except imports.NothingUsable as error:
        raise WorkError(f"import {name}: {error}") from None
    write_metrics(f"imports/{name}", report.as_dict())
    write_metrics(f"cost/{name}", {"cost_usd": None})
    print(f"import {name}: {imports.summary(report)}")


if __name__ == "__main__":
    run(main)
