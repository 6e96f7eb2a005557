"""Crafter as a Gymnasium environment: gymnasium.make("apprentice.environment:apprentice/Crafter-v0").

The same world as everywhere here: `reset(seed=n)` starts the world that a teacher or the benchmark plays as seed n, and
the same actions lead to the same bytes.
"""

import gymnasium
import numpy as np
from gymnasium import spaces

from apprentice.environment import SMALLEST
from apprentice.world.observation import ACTIONS, ITEMS, SIZE, TILES, VIEW, VITALS, Observation
from apprentice.world.world import World


class Crafter(gymnasium.Env):
    """Actions are indices into `world.ACTIONS`; the reward is Crafter's; death terminates, `max_steps` truncates.

    observation: `image` gives the picture, uint8 (size, size, 3); `dict` gives with it what the player can see and
    feel: view, uint8 (7, 9), indices into `world.TILES`; vitals, int64 (4,); inventory, int64 (12,); facing, int64
    (2,); position, int64 (2,); sleeping, 0 or 1; daylight, float32 (1,). `info` has `unlocked` by this step and all
    `achievements` of the episode, the world's `seed` and its `steps`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}  # noqa: RUF012  gymnasium's own form

    def __init__(
        self,
        max_steps: int = 10_000,
        size: int = SIZE,
        observation: str = "image",
        render_mode: str | None = None,
        render_size: int = 512,
    ):
        if observation not in ("image", "dict"):
            raise ValueError(f"observation is {observation!r}; it can be 'image' or 'dict'")
        least = {"max_steps": (max_steps, 1), "size": (size, SMALLEST), "render_size": (render_size, SMALLEST)}
        for name, (value, lowest) in least.items():
            if not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from {lowest} on")
        self.max_steps, self.size, self.structured = max_steps, size, observation == "dict"
        self.render_mode, self.render_size = render_mode, render_size
        self.action_space = spaces.Discrete(len(ACTIONS))
        image = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = image
        if self.structured:
            self.observation_space = spaces.Dict(
                {
                    "image": image,
                    "view": spaces.Box(0, len(TILES) - 1, VIEW[::-1], np.uint8),
                    "vitals": spaces.Box(0, 9, (len(VITALS),), np.int64),
                    "inventory": spaces.Box(0, 9, (len(ITEMS),), np.int64),
                    "facing": spaces.Box(-1, 1, (2,), np.int64),
                    "position": spaces.Box(0, 63, (2,), np.int64),
                    "sleeping": spaces.Discrete(2),
                    "daylight": spaces.Box(0, 1, (1,), np.float32),
                }
            )

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start the world of this seed, however large, or one drawn from the generator that the last seed set."""
        super().reset(seed=seed)
        world_seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self._world = World(world_seed, max_steps=self.max_steps, size=self.size)
        self._steps, self._achievements = 0, ()
        observation = self._world.reset()
        return self._observed(observation), self._info(())

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(
                f"action is {action!r}; actions are integers from 0 to {len(ACTIONS) - 1}: {', '.join(ACTIONS)}"
            )
        outcome = self._world.step(ACTIONS[action])
        self._steps += 1
        self._achievements += outcome.unlocked
        truncated = outcome.done and not outcome.died
        return (
            self._observed(outcome.observation),
            float(outcome.reward),
            outcome.died,
            truncated,
            self._info(outcome.unlocked),
        )

    def render(self):
        """The current picture, uint8 (render_size, render_size, 3); never changes the episode."""
        return self._world.render(self.render_size)

    def _info(self, unlocked: tuple[str, ...]) -> dict:
        return {
            "unlocked": unlocked,
            "achievements": self._achievements,
            "seed": self._world.seed,
            "steps": self._steps,
        }

    def _observed(self, seen: Observation):
        if not self.structured:
            return seen.image
        return {
            "image": seen.image,
            "view": seen.view,
            "vitals": np.array(list(seen.vitals.values()), np.int64),
            "inventory": np.array(list(seen.inventory.values()), np.int64),
            "facing": np.array(seen.facing, np.int64),
            "position": np.array(seen.position, np.int64),
            "sleeping": int(seen.sleeping),
            "daylight": np.array([seen.daylight], np.float32),
        }
