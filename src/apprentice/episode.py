"""The record of play: an Episode is a sequence of Steps, one for each decision."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from apprentice.world.observation import Observation

HISTORY = 32
"""How many past actions a step remembers; no prompt can show more."""


class Sampled(Protocol):
    """What a trainer needs of a reply's tokens; in_process.Sample is one."""

    @property
    def encoded(self) -> Any:
        """What was shown and answered, as the model takes it: an encoding.Encoded."""

    @property
    def logprobs(self) -> list[float]:
        """Log-probability of each token of the answer, at the sampling temperature."""

    @property
    def hidden(self) -> np.ndarray | None:
        """float32: the last hidden state before the answer; None from an engine that doesn't show it."""


@dataclass(frozen=True)
class Reply:
    """What a policy answered, before anybody read it."""

    message: dict
    """An assistant message in OpenAI's form: content, tool_calls."""
    finish_reason: str = "stop"
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    sample: Sampled | None = None
    """Of the student's own, until a trainer has had it: lives in memory only."""


@dataclass(frozen=True)
class Given:
    """What an imported decision was shown: a chat as it came. The observation behind it is not known."""

    messages: tuple[dict, ...]
    """OpenAI chat messages, system and user, with {"type": "image"} in the picture's place."""
    png: bytes | None
    """The picture, None where there was none."""


@dataclass(frozen=True)
class Step:
    """One decision: what was seen, what was answered, what came of it.

    What came of an imported decision is not known: it is zero and empty here, null in files.
    """

    step: int
    """Environment steps before this decision."""
    history: tuple[str, ...]
    """The actions executed before it, the last HISTORY of them at most."""
    observation: Observation | Given
    """Before the first action; this is what the policy was shown."""
    reply: Reply
    asked: tuple[str, ...]
    """The actions that the reply asks for; empty if it is invalid."""
    invalid: str
    """Why the reply could not be read; empty if it could."""
    executed: tuple[str, ...]
    """The actions that were carried out: a noop for an invalid reply, others where the teacher explores."""
    reward: float
    """Crafter's, summed over the executed actions."""
    health_change: int
    """Health points gained or lost over the executed actions."""
    unlocked: tuple[str, ...]
    done: bool
    died: bool
    ending: str = ""
    """Why the episode ends with this decision: "died", "steps" or "calls", the cap that was reached; else empty."""


@dataclass(frozen=True)
class Episode:
    agent: str
    """The teacher's name, or that of the import."""
    seed: int | None
    """Of the world; None for an import that does not say."""
    steps: tuple[Step, ...] = field(repr=False)
    prompt: str = ""
    """The settings of the prompt it was shown with, as JSON."""
    name: str = ""
    """What an imported episode was called where it comes from."""

    @property
    def id(self) -> str:
        return f"{self.agent}-{self.name or self.seed}"

    @property
    def imported(self) -> bool:
        """Known by what was shown and answered alone, and perhaps not in full."""
        return any(isinstance(step.observation, Given) for step in self.steps)

    @property
    def length(self) -> int:
        """Environment steps."""
        return self.steps[-1].step + len(self.steps[-1].executed) if self.steps else 0

    @property
    def unlocked(self) -> tuple[str, ...]:
        return tuple(name for step in self.steps for name in step.unlocked)

    @property
    def reward(self) -> float:
        return sum(step.reward for step in self.steps)
