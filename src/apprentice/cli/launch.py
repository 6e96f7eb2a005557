"""apprentice launch: stages on machines that SkyPilot finds."""

import json
import sys
from typing import Annotated

import typer

from apprentice import compute, params
from apprentice.errors import ConfigError


def launch_stage(
    stage: Annotated[
        str | None, typer.Argument(help="student, sft, distill, rl, agreement or benchmark_student.")
    ] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="For the stage's own command.")] = None,
    status: Annotated[bool, typer.Option("--status", help="What is under way.")] = False,
    logs: Annotated[bool, typer.Option("--logs", help="Follow the stage's log.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the stage, and take its machine down.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only show the task, the machine and its price.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The status, for a script.")] = False,
) -> None:
    """Run a stage on a machine that SkyPilot finds, as compute.yaml says; or look after those under way.

    `dvc repro` does it by itself for a stage with `where: sky`.

    Example: apprentice launch --status
    """
    if sum((status, logs, stop, plan)) > 1:
        raise ConfigError("choose one of --status, --logs, --stop and --plan")
    if stage is None and not status:
        raise ConfigError("name a stage: apprentice launch sft, or ask for --status")

    from apprentice.cloud import launch

    if status:
        under_way = launch.status()
        if as_json:
            print(json.dumps(under_way))
        elif not under_way:
            print("nothing is under way")
        else:
            for found in under_way:
                print(f"{found['stage']:18} {found['job']:12} {found['name']}")
        return
    if logs:
        sys.exit(launch.logs(stage))
    if stop:
        launch.stop(stage)
        return
    place = compute.load().stages.get(stage)
    if place is None:
        raise ConfigError(f"compute.yaml: there is no stages.{stage}, which would say on what it runs")
    student = params.load().active.student
    hub = student if isinstance(student, params.HubStudent) else None
    if plan:
        launch.show(stage, arguments or [], place, hub)
        return
    sys.exit(launch.run(stage, arguments or [], place, hub))
