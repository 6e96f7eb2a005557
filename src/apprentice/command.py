"""How every command ends: 0; 1 the work failed; 2 bad usage or configuration; 130 interrupted."""

import errno
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import typer

from apprentice import compute
from apprentice.params import ConfigError
from apprentice.processes import cores


class WorkError(Exception):
    """The work failed; the message says what, why, and what to do. Exit code 1."""


def write_metrics(name: str, values: dict) -> None:
    """Write metrics/<name>.json, which DVC compares between runs."""
    path = Path(f"metrics/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def run(main: Callable[..., None], timed: bool = True) -> None:
    """Run a stage's main() as a command line; errors of ours are one message, others a traceback.

    timed: how long it took goes to metrics/times/<stage>.json (of a foreach stage <stage>-<key>), an out of each stage
    but the report. It differs from run to run, so nothing but the report may depend on it.

    If compute.yaml sends the stage elsewhere, this process becomes `apprentice launch` instead.
    """
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @application.command()
    @functools.wraps(main)
    def stage(**arguments) -> None:
        began = time.monotonic()
        main(**arguments)
        if not timed:
            return
        name = "-".join([Path(sys.argv[0]).stem, *(str(value) for value in arguments.values() if value)])
        write_metrics(f"times/{name}", {"seconds": round(time.monotonic() - began, 1), "cores": cores()})

    guarded(_elsewhere)
    guarded(application)


def _elsewhere() -> None:
    stage, *arguments = Path(sys.argv[0]).stem, *sys.argv[1:]
    if compute.runs_elsewhere(stage) and "--help" not in arguments:
        # As a program: what decides where a stage runs is no part of the stage, and no dep of it.
        os.execv(sys.executable, [sys.executable, "-m", "apprentice.cli", "launch", stage, *arguments])


def guarded(application: Callable[..., None]) -> None:
    """Call it, and exit with the code that its end deserves."""
    try:
        application()
    except (ConfigError, WorkError) as error:
        fail(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _stop(f"the disk is full ({error}); make room and run the same command again", 1)
    except KeyboardInterrupt:
        # DVC itself ignores Ctrl-C and waits: exit code 0 would make it lock a partial output.
        _stop("interrupted; run the same command again to continue", 130)


def fail(error: ConfigError | WorkError) -> NoReturn:
    """Say it, and exit with its code."""
    _stop(str(error), 2 if isinstance(error, ConfigError) else 1)


def _stop(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
