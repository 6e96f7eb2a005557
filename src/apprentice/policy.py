"""Who plays: a Policy begins a Player for each episode, and the player answers turn by turn."""

from dataclasses import dataclass
from typing import Protocol

from apprentice import prompt
from apprentice.episode import Reply
from apprentice.params import Prompt
from apprentice.world.observation import Observation


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
