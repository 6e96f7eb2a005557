"""Crafter, made deterministic: the same seed and actions give the same bytes in any process."""

import functools
from dataclasses import dataclass

import numpy as np

from apprentice.world import picture, rules
from apprentice.world.observation import ACTIONS, ITEMS, SIZE, VITALS, Observation

VERSION = 1
"""Part of every fingerprint: raise it when the same actions may lead to other bytes."""


@dataclass(frozen=True)
class Outcome:
    """What one environment step led to."""

    observation: Observation
    """After the step."""
    reward: float
    """Crafter's: +1 if anything was unlocked, ±0.1 per health point."""
    unlocked: tuple[str, ...]
    """Achievements unlocked by this step for the first time in the episode."""
    done: bool
    died: bool


class World:
    """One episode of Crafter.

    It plays as crafter 1.8.3 does but for two things that make an episode of stock irreproducible: the chunks
    are sets ordered by memory address (danijar/crafter#31), and the night noise of the picture is drawn from
    the generator of the game (danijar/crafter#36). Here chunks are in order of arrival, and the noise depends on
    nothing but seed, step and picture size: no look at the world changes it.
    """

    def __init__(self, seed: int, max_steps: int = 10_000, size: int = SIZE):
        self.seed, self.max_steps, self.size = seed, max_steps, size
        self.done = True
        self._game: rules.Game | None = None

    def reset(self) -> Observation:
        """Start the episode (again)."""
        # The seed of the first episode of stock's Env(seed=...).
        self._game = rules.Game(hash((self.seed, 1)) % (2**31 - 1))
        self.done = False
        return self._observe()

    def step(self, action: str) -> Outcome:
        """Execute one action, named as in ACTIONS.

        Raises ValueError for an unknown action, RuntimeError when the episode is over.
        """
        if action not in ACTIONS:
            raise ValueError(f"unknown action {action!r}; Crafter's are {', '.join(ACTIONS)}")
        if self.done:
            raise RuntimeError("the episode is over: call reset()")
        reward, unlocked = self._game.step(action)
        died = self._game.player.health <= 0
        self.done = died or bool(self.max_steps and self._game.steps >= self.max_steps)
        return Outcome(self._observe(), reward, unlocked, self.done, died)

    def render(self, size: int = 512) -> np.ndarray:
        """The current picture, uint8 (size, size, 3). Never changes the episode."""
        return picture.draw(self._scene(), size)

    def _scene(self) -> picture.Scene:
        land, player = self._game.land, self._game.player
        return picture.Scene(
            materials=land.window(land.materials, player.x, player.y),
            creatures=land.window(land.tiles, player.x, player.y),
            player=player.texture,
            inventory=tuple(player.inventory.values()),
            sleeping=player.sleeping,
            daylight=self._game.daylight,
            noise=(self.seed & 0xFFFFFFFF, self._game.steps),
        )

    def _observe(self) -> Observation:
        player, scene = self._game.player, self._scene()
        return Observation(
            image=functools.partial(picture.draw, scene, self.size),
            view=np.where(scene.creatures, scene.creatures, scene.materials),
            vitals={name: player.inventory[name] for name in VITALS},
            inventory={name: player.inventory[name] for name in ITEMS},
            facing=player.facing,
            position=(player.x, player.y),
            sleeping=player.sleeping,
            daylight=self._game.daylight,
        )
