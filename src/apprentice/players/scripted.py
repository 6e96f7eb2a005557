"""The built-in policies: `random`, `noop` and `expert`. They look at the observation, not at the prompt."""

from importlib import import_module

from apprentice import prompt
from apprentice.episode import Reply
from apprentice.policy import Turn


class Scripted:
    """A built-in policy by its name, which is that of its module here.

    rationale: the expert also says why, as the text beside its tool call.
    """

    def __init__(self, name: str, rationale: bool = False):
        self.name, self.rationale = name, rationale
        # Not imported by name: a stage then depends on the one that plays (dvc.yaml), and not on all of them.
        self._script = import_module(f"apprentice.players.{name}").script

    def begin(self, seed: int) -> "_ScriptedPlayer":
        return _ScriptedPlayer(self.name, self._script(seed), self.rationale)


class _ScriptedPlayer:
    def __init__(self, name: str, script, rationale: bool):
        self.name, self.script, self.rationale = name, script, rationale

    async def reply(self, turn: Turn) -> Reply:
        action = self.script.act(turn.observation)
        words = self.script.plan.capitalize() + "." if self.rationale else None
        return Reply(prompt.answer([action], words), "tool_calls", self.name)

    def end(self) -> None:
        pass
