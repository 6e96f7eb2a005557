"""Crafter, made deterministic: the same seed and actions give the same bytes in any process."""

from dataclasses import dataclass

import crafter
import numpy as np
from crafter import constants, engine, objects

VERSION = 1
"""Part of every fingerprint: raise it when the same actions may lead to other bytes."""

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
VIEW = (9, 7)
"""Columns and rows of the world that the player sees; the player is in the middle."""
SIZE = 72
"""Side of the recorded picture in pixels: 8 pixels a tile, 9 × 9 tiles, the lower two rows the inventory."""

_TILE = {name: code for code, name in enumerate(TILES)}
_ACTION = {name: code for code, name in enumerate(ACTIONS)}


@dataclass(frozen=True)
class Observation:
    """What the player sees at one moment; the policy gets this and nothing else."""

    image: np.ndarray
    """uint8, (SIZE, SIZE, 3)."""
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

    Two things in stock crafter 1.8.3 make an episode irreproducible, and are replaced here: the chunks are
    sets ordered by memory address (danijar/crafter#31), and the night noise of the picture is drawn from the
    generator of the game (danijar/crafter#36).
    """

    def __init__(self, seed: int, max_steps: int = 10_000, size: int = SIZE):
        self.seed, self.max_steps, self.size = seed, max_steps, size
        self._env = crafter.Env(seed=seed, length=max_steps, size=(size, size))
        self._env._local_view = _LocalView(self._env._world, self._env._textures, VIEW)
        self.done = True

    def reset(self) -> Observation:
        """Start the episode (again)."""
        env = self._env
        env._episode = 0
        engine_reset = env._world.reset

        def reset_ordered(seed=None):
            engine_reset(seed)
            env._world._chunks = _Chunks()

        env._world.reset = reset_ordered
        env._obs = lambda: None
        try:
            env.reset()
        finally:
            env._world.reset = engine_reset
        self.done = False
        return self._observe()

    def step(self, action: str) -> Outcome:
        """Execute one action, named as in ACTIONS.

        Raises ValueError for an unknown action, RuntimeError when the episode is over.
        """
        if action not in _ACTION:
            raise ValueError(f"unknown action {action!r}; Crafter's are {', '.join(ACTIONS)}")
        if self.done:
            raise RuntimeError("the episode is over: call reset()")
        env = self._env
        before = set(env._unlocked)
        _, reward, done, info = env.step(_ACTION[action])
        self.done = bool(done)
        unlocked = tuple(name for name in ACHIEVEMENTS if name in env._unlocked and name not in before)
        return Outcome(self._observe(), float(reward), unlocked, self.done, info["discount"] == 0)

    def render(self, size: int = 512) -> np.ndarray:
        """The current picture, uint8 (size, size, 3). Never changes the episode."""
        self._env._local_view.noise_seed = (self.seed & 0xFFFFFFFF, self._env._step)
        env = self._env
        env._size, recorded = np.array((size, size)), env._size
        try:
            return np.ascontiguousarray(env.render())
        finally:
            env._size = recorded

    def _observe(self) -> Observation:
        player = self._env._player
        return Observation(
            image=self.render(self.size),
            view=self._view(),
            vitals={name: int(player.inventory[name]) for name in VITALS},
            inventory={name: int(player.inventory[name]) for name in ITEMS},
            facing=(int(player.facing[0]), int(player.facing[1])),
            position=(int(player.pos[0]), int(player.pos[1])),
            sleeping=bool(player.sleeping),
            daylight=float(self._env._world.daylight),
        )

    def _view(self) -> np.ndarray:
        world, (px, py) = self._env._world, self._env._player.pos
        view = np.zeros((VIEW[1], VIEW[0]), np.uint8)
        for row in range(VIEW[1]):
            for column in range(VIEW[0]):
                material, creature = world[px + column - VIEW[0] // 2, py + row - VIEW[1] // 2]
                if material is None:
                    continue
                name = material
                if isinstance(creature, objects.Player):
                    name = "player"
                elif creature is not None:
                    name = creature.texture
                view[row, column] = _TILE[name]
        return view


class _LocalView(engine.LocalView):
    noise_seed: tuple[int, int] = (0, 0)

    def _noise(self, canvas, amount, stddev):
        noise = np.random.RandomState(self.noise_seed).uniform(32, 127, canvas.shape[:2])[..., None]
        mask = amount * self._vignette(canvas.shape, stddev)[..., None]
        return (1 - mask) * canvas + mask * noise


class _Chunks(dict):
    """The chunks of a world, each in the order in which its creatures came."""

    def __missing__(self, key):
        return self.setdefault(key, _Ordered())


class _Ordered(dict):
    def add(self, item):
        self[item] = None

    def remove(self, item):
        del self[item]
