"""Who can be asked to play: those built in, the student's weights, and models behind an endpoint."""

from apprentice import params
from apprentice.errors import ConfigError

SCRIPTED = ("random", "noop", "expert")
ME = "me"


def students(settings: params.Params | None) -> dict[str, str]:
    """Folders of weights by name."""
    usual = {name: f"models/{name}" for name in ("base", "sft", "distill", "rl")}
    return usual | (settings.benchmark.students if settings else {})


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
