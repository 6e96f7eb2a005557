"""The command `apprentice`: what is done by hand beside `dvc repro`. A file for each command; all are named here.

A command imports what is heavy when it runs: `apprentice --help` and completion have to be quick.
"""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated

from apprentice.errors import ConfigError, fail, guarded

if not find_spec("typer"):
    fail(ConfigError("only the world is installed here, without the command; run pip install 'apprentice[all]'"))

import typer

from apprentice.cli import (
    cache,
    doctor,
    estimate,
    export,
    imports,
    launch,
    merge,
    play,
    report,
    results,
    serve,
    settings,
    side_by_side,
    traces,
)

application = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Teach a vision-language model to play Crafter.",
)
_SEE, _DATA, _RUN = "See", "Data", "Run the pipeline"
application.command("play", rich_help_panel=_SEE)(play.play)
application.command("film", rich_help_panel=_SEE)(side_by_side.film)
application.add_typer(traces.application, name="traces", rich_help_panel=_SEE)
application.command("results", rich_help_panel=_SEE)(results.show_results)
application.command("report", rich_help_panel=_SEE)(report.report)
application.command("import", rich_help_panel=_DATA)(imports.add_imports)
application.command("export", rich_help_panel=_DATA)(export.export)
application.command("merge", rich_help_panel=_DATA)(merge.merge_adapter)
application.command("serve", rich_help_panel=_RUN)(serve.serve)
application.add_typer(cache.application, name="cache", rich_help_panel=_RUN)
application.command("settings", rich_help_panel=_RUN)(settings.show_settings)
application.command("doctor", rich_help_panel=_RUN)(doctor.doctor)
application.command("estimate", rich_help_panel=_RUN)(estimate.show_estimate)
application.command(
    "launch", rich_help_panel=_RUN, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True}
)(launch.launch_stage)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"apprentice {version('apprentice')}")
        raise typer.Exit


@application.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def main() -> None:
    guarded(application)
