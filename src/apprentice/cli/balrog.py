"""`apprentice export balrog`: the agent that asks `apprentice serve` from within BALROG's own evaluator."""

from pathlib import Path
from pprint import pformat

from apprentice import prompt
from apprentice.errors import ConfigError
from apprentice.params import Prompt
from apprentice.world.observation import ITEMS, SIZE

AGENT = Path(__file__).with_name("balrog_agent.py")
_OPEN = "SETTINGS: dict = {}"


def write(out: Path, shown: Prompt) -> None:
    """custom.py in the folder `out`. Raises ConfigError for a prompt that BALROG's observation cannot fill."""
    for name, wrong in (("mode", shown.mode != "image"), ("position", shown.position)):
        if wrong:
            raise ConfigError(
                f"the student's prompt has {name}: {str(getattr(shown, name)).lower()}, which BALROG's text cannot "
                "give; only students with mode: image and position: false can be evaluated there"
            )
    settings = {
        "system": prompt.system(shown),
        "tools": prompt.TOOLS,
        "items": ITEMS if shown.inventory == "all" else (),
        "history": shown.history,
        "max_actions": shown.max_actions,
        "size": prompt.size(shown),
        "side": SIZE,
    }
    filled = f"SETTINGS: dict = {pformat(settings, width=110, sort_dicts=False)}"
    (out / "custom.py").write_text(AGENT.read_text().replace(_OPEN, filled))
