"""Crafter, made deterministic and fast: `from apprentice.world import World`."""

# First, because in importing crafter numba looks for its cache.
import apprentice.world.jit  # isort: skip  # noqa: F401

from apprentice.world.observation import (
    ACHIEVEMENTS,
    ACTIONS,
    ITEMS,
    SIZE,
    TILES,
    VIEW,
    VITALS,
    Observation,
    constants,
)
from apprentice.world.world import VERSION, Outcome, World

__all__ = [
    "ACHIEVEMENTS",
    "ACTIONS",
    "ITEMS",
    "SIZE",
    "TILES",
    "VERSION",
    "VIEW",
    "VITALS",
    "Observation",
    "Outcome",
    "World",
    "constants",
]
