"""Who plays: a Policy begins a Player for each episode, and the player answers turn by turn."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from apprentice import prompt
from apprentice.episode import Reply
from apprentice.expert import Expert
from apprentice.params import Prompt
from apprentice.world import ACTIONS, Observation


@dataclass(frozen=True)
class Turn:
    """What a player may use to decide."""

    observation: Observation
    history: tuple[str, ...]
    """The last actions executed, at most `episode.HISTORY`."""
    settings: Prompt

    @property
    def messages(self) -> list[dict]:
        """What a model is shown, as OpenAI chat messages."""
        return prompt.messages(self.observation, self.settings, self.history)


class Player(Protocol):
    async def reply(self, turn: Turn) -> Reply: ...

    def end(self) -> None:
        """The episode is over."""


class Policy(Protocol):
    name: str

    def begin(self, seed: int) -> Player: ...


class Scripted:
    """The built-in policies: `random`, `noop` and `expert`. They look at the observation, not at the prompt.

    rationale: the expert also says why, as the text beside its tool call.
    """

    def __init__(self, name: str, rationale: bool = False):
        self.name, self.rationale = name, rationale

    def begin(self, seed: int) -> Player:
        script = {"random": _Random, "noop": _Noop, "expert": Expert}[self.name]()
        return _ScriptedPlayer(self.name, script, seed, self.rationale)


class _ScriptedPlayer:
    def __init__(self, name: str, script, seed: int, rationale: bool):
        self.name, self.script, self.rationale = name, script, rationale
        if isinstance(script, _Random):
            script.generator = np.random.default_rng([seed, 1])

    async def reply(self, turn: Turn) -> Reply:
        action = self.script.act(turn.observation)
        words = self.script.plan.capitalize() + "." if self.rationale else None
        return Reply(prompt.answer([action], words), "tool_calls", self.name)

    def end(self) -> None:
        pass


class _Random:
    generator: np.random.Generator

    def act(self, observation: Observation) -> str:
        return ACTIONS[self.generator.integers(len(ACTIONS))]


class _Noop:
    def act(self, observation: Observation) -> str:
        return "noop"
