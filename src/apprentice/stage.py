"""How a stage begins and ends: its command line, its exit code, its metrics and plots."""

import csv
import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import typer

from apprentice import compute
from apprentice.episode import Episode
from apprentice.errors import ConfigError, guarded
from apprentice.files import replacing
from apprentice.progress import quiet
from apprentice.schema import parsed
from apprentice.workers import cores


def run(main: Callable[..., None], timed: bool = True) -> None:
    """Run a stage's main() as a command line. An error of ours is one message, any other a traceback.

    timed: how long the stage took goes to metrics/times/<stage>.json (<stage>-<key>.json where there are several), with
    where, when and of which commit. Each stage but settings and report has that file as an output. It differs from run
    to run: only the report depends on it.

    If compute.yaml sends the stage elsewhere, this process becomes `apprentice launch` instead.
    """
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @application.command()
    @functools.wraps(main)
    def stage(**arguments) -> None:
        if "DVC_STAGE" in os.environ:  # by DVC
            print(place(os.environ["DVC_STAGE"]), flush=True)
        began = time.monotonic()
        try:
            main(**arguments)
        except ConfigError as error:
            raise ConfigError(f"{error}{_removed()}") from None
        finally:
            _no_longer_live(Path(sys.argv[0]).stem)
        if not timed:
            return
        name = "-".join([Path(sys.argv[0]).stem, *(str(value) for value in arguments.values() if value)])
        write_metrics(f"times/{name}", {"seconds": round(time.monotonic() - began, 1)} | _circumstances())

    quiet()
    guarded(_elsewhere)
    guarded(application)


def _no_longer_live(stage: str) -> None:
    """A stage that has ended, however that came about, has nothing more in metrics/live.json."""
    if Path(f"metrics/{LIVE}.json").exists() and read_metrics(LIVE).get("stage") == stage:
        write_metrics(LIVE, {})


def _removed() -> str:
    """DVC removes a stage's outputs before it runs, so that a bad setting would seem to have cost them."""
    stage, lock = os.environ.get("DVC_STAGE"), Path("dvc.lock")
    if stage is None or not lock.exists() or f"\n  {stage}:\n" not in lock.read_text():
        return ""
    return f"\nDVC had removed the outputs of {stage} before; `dvc checkout` brings them back"


def place(stage: str) -> str:
    """Where a stage stands among all that params.yaml asks for: stage 3 of 17, in the order of dvc.yaml."""
    names = []
    try:
        settings, pipeline = (parsed(Path(name)) for name in ("params.yaml", "dvc.yaml"))
        for name, definition in pipeline["stages"].items():
            if "foreach" in definition:
                keys = functools.reduce(dict.__getitem__, definition["foreach"].strip("${}").split("."), settings)
                names += [f"{name}@{key}" for key in keys]
            else:
                names.append(name)
        return f"stage {names.index(stage) + 1} of {len(names)}: {stage}"
    except (ConfigError, KeyError, TypeError, ValueError):  # what is wrong with params.yaml, the stage will say
        return f"stage {stage}"


def _elsewhere() -> None:
    stage, *arguments = Path(sys.argv[0]).stem, *sys.argv[1:]
    if compute.runs_elsewhere(stage) and "--help" not in arguments:
        # As a program: what decides where a stage runs is no part of the stage, and no dependency of it. It is this
        # checkout's, as the stage is.
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.execv(sys.executable, [sys.executable, "-m", "apprentice", "launch", stage, *arguments])


LIVE = "live"
"""metrics/live.json: what a training stage has come to so far, for `dvc exp show` and the editor; otherwise {}. No
stage's out, and in git, since DVC complains of metrics that are not there."""


def told(episode: Episode, dollars: float | None = None) -> str:
    """What became of an episode, in a line."""
    cost = f", ${dollars:.4f}" if dollars else ""
    end = ", no calls left" if episode.steps[-1].ending == "calls" else ""
    names = ", ".join(episode.unlocked) or "none"
    return f"seed {episode.seed}: {episode.length} steps{end}{cost}, {len(episode.unlocked)} achievements: {names}"


def _circumstances() -> dict:
    """Where, when and of which commit a stage is run; commit is None where there is no git."""

    def git(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *command], capture_output=True, text=True)

    try:
        commit = git("rev-parse", "--short", "HEAD").stdout.strip() or None
        # What the pipeline itself writes, dvc.lock and metrics, is no change of the code.
        changed = bool(commit) and git("diff", "--quiet", "HEAD", "--", "src", "stages", "params.yaml").returncode != 0
    except OSError:
        commit, changed = None, False
    return {
        "cores": cores(),
        "processor": _processor(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit,
        "changed": changed,
    }


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def read_metrics(name: str) -> dict:
    """What metrics/<name>.json has. Raises FileNotFoundError."""
    return json.loads(Path(f"metrics/{name}.json").read_text())


def write_metrics(name: str, values: dict) -> None:
    """Write metrics/<name>.json."""
    with replacing(Path(f"metrics/{name}.json")) as path:
        path.write_text(json.dumps(values, indent=2) + "\n")


def write_plot(name: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write metrics/plots/<name>.csv, which DVC draws. Floats have six significant digits."""
    with replacing(Path(f"metrics/plots/{name}.csv")) as path, path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)


def write_curve(name: str, history: Iterable[dict], columns: dict[str, str], x: str = "step") -> None:
    """Write as a plot the rows of a trainer's log that have all of these keys: key in the log → name of the column.

    x: the key that goes into the first column.
    """
    rows = ([row[x], *(float(row[key]) for key in columns)] for row in history if columns.keys() <= row.keys())
    write_plot(name, [x, *columns.values()], rows)
