"""What a player can see, do and unlock: Crafter's names, and the observation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from crafter import constants

ACTIONS: tuple[str, ...] = tuple(constants.actions)
ACHIEVEMENTS: tuple[str, ...] = tuple(constants.achievements)
VITALS: tuple[str, ...] = ("health", "food", "drink", "energy")
ITEMS: tuple[str, ...] = tuple(name for name in constants.items if name not in VITALS)
TILES: tuple[str, ...] = (
    "void",
    *constants.materials,
    "player",
    "cow",
    "zombie",
    "skeleton",
    "arrow-left",
    "arrow-right",
    "arrow-up",
    "arrow-down",
    "plant",
    "plant-ripe",
)
"""What a cell of `Observation.view` can hold: a material, or the creature standing on it."""
VIEW: tuple[int, int] = (9, 7)
"""Columns and rows of the world that the player sees; the player is in the middle."""
SIZE = 72
"""Side of the recorded picture in pixels: 8 pixels a tile, 9 × 9 tiles, the lower two rows the inventory."""


class _Picture:
    """An attribute given as an array, or as a function that makes the array when it is first looked at."""

    def __get__(self, observation: Any, _: type | None = None) -> np.ndarray:
        if observation is None:
            # To dataclasses this says that the field has no default.
            raise AttributeError("image")
        image = observation.__dict__["image"]
        if callable(image):
            image = observation.__dict__["image"] = image()
        return image

    def __set__(self, observation: Any, image: Any) -> None:
        observation.__dict__["image"] = image


@dataclass(frozen=True)
class Observation:
    """What the player sees at one moment; the policy gets this and nothing else."""

    image: np.ndarray = _Picture()
    """uint8, (SIZE, SIZE, 3). Drawn on the first look, from what there was to see at that moment."""
    view: np.ndarray
    """uint8, (7, 9): rows from top to bottom, columns from left to right; index into TILES."""
    vitals: dict[str, int]
    """health, food, drink, energy: 0 to 9."""
    inventory: dict[str, int]
    """Every item that can be owned, 0 to 9, those not owned included."""
    facing: tuple[int, int]
    """(dx, dy), y pointing down."""
    position: tuple[int, int]
    """(x, y) on the 64 × 64 map, y pointing down."""
    sleeping: bool
    """Asleep: every action is executed as `sleep` until the player wakes."""
    daylight: float
    """0 (night) to 1 (day); the picture darkens with it."""
    png: bytes | None = None
    """The picture as PNG, where the observation comes from a file."""
