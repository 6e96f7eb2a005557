"""What is asked of the world and answered, as JSON; the forms of reset, step and state are OpenEnv's."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from apprentice import prompt
from apprentice.environment import SMALLEST
from apprentice.params import Prompt
from apprentice.world import png
from apprentice.world.observation import ACTIONS, SIZE, TILES, VIEW, Observation
from apprentice.world.world import Outcome

Seed = Annotated[int, Field(ge=0, lt=2**31)]
Steps = Annotated[int, Field(ge=1, le=10_000)]
_TEXT = Prompt(mode="text")


class Wrong(Exception):
    """A request that cannot be carried out; the message says what would be right. `status` is HTTP's."""

    status = 409


class NoSuchSession(Wrong):
    status = 404


class Busy(Wrong):
    """Later it can."""

    status = 503


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ResetRequest(_Request):
    """What an episode is started with."""

    seed: Seed | None = None
    """Of the world; without one, a random world."""
    episode_id: Annotated[str, Field(max_length=255)] | None = None
    max_steps: Steps = 10_000
    size: Annotated[int, Field(ge=SMALLEST, le=512)] = SIZE
    """Side of the picture in pixels."""


class ActionBody(_Request):
    """One environment step."""

    action: Literal[ACTIONS]
    metadata: dict[str, Any] = {}
    """OpenEnv's; not looked at."""


class StepRequest(_Request):
    """A step by plain HTTP; by WebSocket it is the action alone."""

    action: ActionBody


class RolloutRequest(_Request):
    """A whole episode, played here."""

    policy: str
    """A built-in one, the student (base, sft, rl), or an endpoint that this server was started with."""
    seed: Seed
    max_steps: Steps = 200
    images: bool = True


class ObservationBody(BaseModel):
    """After a reset or a step."""

    seed: int
    step: int
    """Of the episode, 0 after the reset: with the seed, which request an answer that comes late belongs to."""
    image: str
    """A PNG in base64."""
    text: str
    """Status, inventory and surroundings in words."""
    view: list[list[str]]
    """The 7 rows of 9 cells around the player, by name."""
    vitals: dict[str, int]
    inventory: dict[str, int]
    facing: tuple[int, int]
    position: tuple[int, int]
    sleeping: bool
    daylight: float
    unlocked: list[str]
    """Achievements unlocked by this step."""
    died: bool


class StateBody(BaseModel):
    episode_id: str | None
    step_count: int
    seed: int | None
    max_steps: int
    done: bool
    achievements: list[str]


def answer(seed: int, step: int, seen: Observation, outcome: Outcome | None = None) -> dict:
    """OpenEnv's form of a result (`serialize_observation`). outcome: what the step led to; None after a reset."""
    body = ObservationBody(
        seed=seed,
        step=step,
        image=in_base64(png.encode(seen.image)),
        text=prompt.text(seen, _TEXT),
        view=by_name(seen.view.ravel()),
        vitals=seen.vitals,
        inventory=seen.inventory,
        facing=seen.facing,
        position=seen.position,
        sleeping=seen.sleeping,
        daylight=float(seen.daylight),
        unlocked=list(outcome.unlocked) if outcome else [],
        died=outcome.died if outcome else False,
    )
    return {
        "observation": body.model_dump(),
        "reward": outcome.reward if outcome else None,
        "done": outcome.done if outcome else False,
    }


def in_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def by_name(view: Sequence[int]) -> list[list[str]]:
    """A view of 63 cells, row after row, as 7 rows of 9 names."""
    columns, rows = VIEW
    return [[TILES[code] for code in view[row * columns : (row + 1) * columns]] for row in range(rows)]
