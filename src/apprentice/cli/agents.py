"""Who can be asked to play: those built in, the student's weights, and models behind an endpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from apprentice import params
from apprentice.errors import ConfigError

if TYPE_CHECKING:
    from apprentice.serving.in_process import InProcess

SCRIPTED = ("random", "noop", "expert")
ME = "me"
BASE = "models/base"


def students(settings: params.Params | None) -> dict[str, str]:
    """Folders of weights by name."""
    usual = {name: f"models/{name}" for name in ("base", "sft", "distill", "rl")}
    return usual | (settings.benchmark.students if settings else {})


def adapter(name: str, settings: params.Params) -> str | None:
    """The folder of a student's adapter, None for the base itself. Raises ConfigError where weights are missing."""
    weights = students(settings)[name]
    for folder in (BASE, weights):
        if not Path(folder).is_dir():
            raise ConfigError(f"{name} needs {folder}, which is not there; make it by dvc repro, or dvc pull it")
    return None if weights == BASE else weights


def student(name: str, settings: params.Params) -> "InProcess":
    """The student in this process. Raises ConfigError where weights are missing."""
    folder = adapter(name, settings)
    from apprentice.serving import in_process
    from apprentice.workers import cores

    profile = settings.active
    # Two threads wait for each other at each layer of so small a model: an answer takes twice as long (LOG.md).
    threads = 1 if profile.student.model == "tiny" else cores()
    sampling = profile.sampling
    return in_process.load(name, folder, profile.dtype, sampling.temperature, sampling.max_tokens, threads)


def models(settings: params.Params | None) -> dict[str, tuple[params.Agent, str]]:
    """The teachers and the benchmark's agents behind an endpoint, by name, each with where it stands in params.yaml."""
    if settings is None:
        return {}
    places = {"benchmark.agents": settings.benchmark.agents, "teachers": settings.teachers}
    return {
        name: (player, f"{place}.{name}.endpoint")
        for place, players in places.items()
        for name, player in players.items()
        if player.endpoint
    }


def names() -> list[str]:
    """All of them, for the shell's completion too."""
    try:
        settings = params.load()
    except ConfigError:
        settings = None
    return [*SCRIPTED, *students(settings), *models(settings), ME]
