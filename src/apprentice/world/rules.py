"""Crafter's rules on plain integers (crafter 1.8.3: `objects.py`, and `step` of `env.py`).

Stock spends most of a step outside of its renderer on numpy arrays of two numbers. Here a place on the map is
one integer, and the map is two byte strings that numpy can look into. What the rules say is read from crafter's
own data; where stock draws from its generator, so does this, in the same order. One thing is unlike stock: a
chunk keeps its creatures in the order in which they came, not by memory address (danijar/crafter#31).
"""

import itertools

import numpy as np
from crafter import constants

from apprentice.world import terrain
from apprentice.world.observation import TILES, VIEW

TILE = {name: code for code, name in enumerate(TILES)}

MARGIN = 4
"""Void around the map, so that neither a view nor a step ever leaves the byte strings."""
WIDTH, HEIGHT = terrain.AREA[0] + 2 * MARGIN, terrain.AREA[1] + 2 * MARGIN

_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_ANY_DIRECTION = tuple(_DIRECTIONS.values())
_FACING = {direction: name for name, direction in _DIRECTIONS.items()}
_MOST = {name: item["max"] for name, item in constants.items.items()}
_WALKABLE = frozenset(TILE[name] for name in constants.walkable)
_NEAR = 18
"""Creatures further from the player than this stand still: twice the longer side of the picture's 9 × 9 tiles."""
_CHUNK = 12


def _cell(x: int, y: int) -> int:
    return (x + MARGIN) * HEIGHT + y + MARGIN


class Dice:
    """The draws of `np.random.RandomState(seed)`, without the time that numpy takes to check arguments."""

    def __init__(self, seed: int):
        self.state = np.random.RandomState(seed)

    def uniform(self) -> float:
        """As `uniform()`."""
        return self.state.random_sample()

    def below(self, count: int) -> int:
        """As `randint(0, count)`: words of the generator, cut to the bits needed, until one is small enough."""
        if count == 1:
            return 0
        word = self.state._bit_generator.random_raw
        mask = (1 << (count - 1).bit_length()) - 1
        while (number := word() & mask) >= count:
            pass
        return number


class Land:
    """The map and who stands where."""

    def __init__(self, dice: Dice):
        self.dice = dice
        self.materials = bytearray(WIDTH * HEIGHT)
        """Codes of TILES by cell."""
        self.tiles = bytearray(WIDTH * HEIGHT)
        """What a creature in the cell looks like, a code of TILES; 0 where there's none."""
        self.occupants: dict[int, Creature] = {}
        """By cell."""
        self.creatures: dict[Creature, None] = {}
        """In the order in which they came, which is the order of their turns."""
        self.chunks: dict[tuple[int, int], dict[Creature, None]] = {}

    def grid(self, cells: bytearray) -> np.ndarray:
        """A view of `materials` or `tiles`, uint8 (64, 64), indexed [x, y]."""
        return np.frombuffer(cells, np.uint8).reshape(WIDTH, HEIGHT)[MARGIN:-MARGIN, MARGIN:-MARGIN]

    def window(self, cells: bytearray, x: int, y: int) -> np.ndarray:
        """A copy of `materials` or `tiles` around a place, uint8 (7, 9): rows from top to bottom."""
        left, top = x + MARGIN - VIEW[0] // 2, y + MARGIN - VIEW[1] // 2
        grid = np.frombuffer(cells, np.uint8).reshape(WIDTH, HEIGHT)
        return grid[left : left + VIEW[0], top : top + VIEW[1]].T.copy()

    def add(self, creature: "Creature") -> None:
        self.occupants[creature.cell] = creature
        self.tiles[creature.cell] = creature.tile
        self.creatures[creature] = None
        self.chunks.setdefault(creature.chunk, {})[creature] = None

    def remove(self, creature: "Creature") -> None:
        del self.occupants[creature.cell]
        self.tiles[creature.cell] = 0
        del self.creatures[creature]
        del self.chunks[creature.chunk][creature]
        creature.removed = True

    def move(self, creature: "Creature", dx: int, dy: int) -> None:
        before = creature.chunk
        del self.occupants[creature.cell]
        self.tiles[creature.cell] = 0
        creature.place(creature.x + dx, creature.y + dy)
        self.occupants[creature.cell] = creature
        self.tiles[creature.cell] = creature.tile
        if creature.chunk != before:
            del self.chunks[before][creature]
            self.chunks.setdefault(creature.chunk, {})[creature] = None

    def nearby(self, x: int, y: int) -> set[int]:
        """The materials within distance 1.

        None on the map's first column and row: there stock slices from -1, and gets nothing.
        """
        if x == 0 or y == 0:
            return set()
        columns = (_cell(column, y) for column in (x - 1, x, x + 1))
        return set(itertools.chain.from_iterable(self.materials[middle - 1 : middle + 2] for middle in columns))


class Creature:
    """Something that stands on the map and takes turns."""

    tile: int
    walkable = _WALKABLE

    def __init__(self, land: Land, x: int, y: int, health: int = 0):
        self.land, self.dice = land, land.dice
        self.health = health
        self.removed = False
        self.place(x, y)

    def place(self, x: int, y: int) -> None:
        self.x, self.y, self.cell = x, y, _cell(x, y)
        self.chunk = (x // _CHUNK, y // _CHUNK)

    def hurt(self, damage: int) -> None:
        self.health = max(0, self.health - damage)

    def free(self, dx: int, dy: int, walkable: frozenset[int]) -> bool:
        cell = self.cell + dx * HEIGHT + dy
        return self.land.materials[cell] in walkable and cell not in self.land.occupants

    def move(self, dx: int, dy: int) -> bool:
        """Whether the way was free. A creature that has been removed in its turn walks on without moving."""
        if not self.free(dx, dy, self.walkable):
            return False
        if not self.removed:
            self.land.move(self, dx, dy)
        return True

    def move_anywhere(self) -> None:
        self.move(*_ANY_DIRECTION[self.dice.below(4)])

    def distance(self, other: "Creature") -> int:
        return abs(self.x - other.x) + abs(self.y - other.y)

    def toward(self, other: "Creature", long_axis: bool = True) -> tuple[int, int]:
        dx, dy = other.x - self.x, other.y - self.y
        if (abs(dx) > abs(dy)) == long_axis:
            return (dx > 0) - (dx < 0), 0
        return 0, (dy > 0) - (dy < 0)


class Player(Creature):
    tile = TILE["player"]
    walkable = _WALKABLE | {TILE["lava"]}

    def __init__(self, land: Land, x: int, y: int):
        self.inventory = {name: item["initial"] for name, item in constants.items.items()}
        self.achievements = {name: 0 for name in constants.achievements}
        super().__init__(land, x, y, self.health)
        self.facing = (0, 1)
        self.sleeping = False
        self._health_before = self.health
        self._hunger = self._thirst = self._fatigue = self._recover = 0

    @property
    def health(self) -> int:
        return self.inventory["health"]

    @health.setter
    def health(self, value: int) -> None:
        self.inventory["health"] = value

    @property
    def texture(self) -> str:
        """Name of the picture in crafter's assets."""
        if self.sleeping:
            return "player-sleep"
        return f"player-{_FACING[self.facing]}"

    def update(self, action: str) -> None:
        if self.sleeping:
            if self.inventory["energy"] < constants.items["energy"]["max"]:
                action = "sleep"
            else:
                self.sleeping = False
                self.achievements["wake_up"] += 1
        target = (self.x + self.facing[0], self.y + self.facing[1])
        verb, _, name = action.partition("_")
        if verb == "move":
            self._walk(name)
        elif verb == "do":
            self._do(*target)
        elif verb == "sleep":
            if self.inventory["energy"] < constants.items["energy"]["max"]:
                self.sleeping = True
        elif verb == "place":
            self._place(name, *target)
        elif verb == "make":
            self._make(name)
        self._get_hungry_thirsty_and_tired()
        self._recover_or_suffer()
        for item, amount in self.inventory.items():
            if not 0 <= amount <= _MOST[item]:
                self.inventory[item] = max(0, min(amount, _MOST[item]))
        # Only now, with health within its bounds.
        if self.health < self._health_before:
            self.sleeping = False
        self._health_before = self.health

    def _get_hungry_thirsty_and_tired(self) -> None:
        inventory = self.inventory
        self._hunger += 0.5 if self.sleeping else 1
        if self._hunger > 25:
            self._hunger = 0
            inventory["food"] -= 1
        self._thirst += 0.5 if self.sleeping else 1
        if self._thirst > 20:
            self._thirst = 0
            inventory["drink"] -= 1
        self._fatigue = min(self._fatigue - 1, 0) if self.sleeping else self._fatigue + 1
        if self._fatigue < -10:
            self._fatigue = 0
            inventory["energy"] += 1
        if self._fatigue > 30:
            self._fatigue = 0
            inventory["energy"] -= 1

    def _recover_or_suffer(self) -> None:
        inventory = self.inventory
        if inventory["food"] > 0 and inventory["drink"] > 0 and (inventory["energy"] > 0 or self.sleeping):
            self._recover += 2 if self.sleeping else 1
        else:
            self._recover -= 0.5 if self.sleeping else 1
        if self._recover > 25:
            self._recover = 0
            self.health += 1
        if self._recover < -15:
            self._recover = 0
            self.hurt(1)

    def _walk(self, direction: str) -> None:
        self.facing = _DIRECTIONS[direction]
        self.move(*self.facing)
        if self.land.materials[self.cell] == TILE["lava"]:
            self.health = 0

    def _do(self, x: int, y: int) -> None:
        creature = self.land.occupants.get(_cell(x, y))
        if creature is None:
            self._collect(_cell(x, y))
        elif isinstance(creature, Plant):
            if creature.ripe:
                creature.pick()
                self.inventory["food"] += 4
                self.achievements["eat_plant"] += 1
        elif isinstance(creature, Cow | Zombie | Skeleton):
            creature.hurt(self._damage())
            if creature.health > 0:
                return
            if isinstance(creature, Cow):
                self.inventory["food"] += 6
                self._hunger = 0
            self.achievements[creature.achievement] += 1

    def _damage(self) -> int:
        strengths = {"wood_sword": 2, "stone_sword": 3, "iron_sword": 5}
        return max([1, *(damage for sword, damage in strengths.items() if self.inventory[sword])])

    def _collect(self, cell: int) -> None:
        material = TILES[self.land.materials[cell]]
        if material == "water":
            self._thirst = 0
        rule = constants.collect.get(material)
        if rule is None or not self._owns(rule["require"]):
            return
        self.land.materials[cell] = TILE[rule["leaves"]]
        if self.dice.uniform() <= rule.get("probability", 1):
            for name, amount in rule["receive"].items():
                self.inventory[name] += amount
                self.achievements[f"collect_{name}"] += 1

    def _place(self, name: str, x: int, y: int) -> None:
        land, cell, rule = self.land, _cell(x, y), constants.place[name]
        if cell in land.occupants or TILES[land.materials[cell]] not in rule["where"] or not self._owns(rule["uses"]):
            return
        self._use(rule["uses"])
        if rule["type"] == "material":
            land.materials[cell] = TILE[name]
        else:
            land.add({"plant": Plant}[name](land, x, y))
        self.achievements[f"place_{name}"] += 1

    def _make(self, name: str) -> None:
        rule, nearby = constants.make[name], self.land.nearby(self.x, self.y)
        if not all(TILE[tool] in nearby for tool in rule["nearby"]) or not self._owns(rule["uses"]):
            return
        self._use(rule["uses"])
        self.inventory[name] += rule["gives"]
        self.achievements[f"make_{name}"] += 1

    def _owns(self, items: dict[str, int]) -> bool:
        return all(self.inventory[name] >= amount for name, amount in items.items())

    def _use(self, items: dict[str, int]) -> None:
        for name, amount in items.items():
            self.inventory[name] -= amount


class Cow(Creature):
    tile = TILE["cow"]
    achievement = "eat_cow"

    def __init__(self, land: Land, x: int, y: int, player: Player):
        super().__init__(land, x, y, health=3)

    def update(self) -> None:
        if self.health <= 0:
            self.land.remove(self)
        if self.dice.uniform() < 0.5:
            self.move_anywhere()


class Zombie(Creature):
    tile = TILE["zombie"]
    achievement = "defeat_zombie"

    def __init__(self, land: Land, x: int, y: int, player: Player):
        super().__init__(land, x, y, health=5)
        self.player = player
        self.cooldown = 0

    def update(self) -> None:
        # As in stock, a zombie just killed still takes its last turn, draws and blow included.
        if self.health <= 0:
            self.land.remove(self)
        if self.distance(self.player) <= 8 and self.dice.uniform() < 0.9:
            self.move(*self.toward(self.player, self.dice.uniform() < 0.8))
        else:
            self.move_anywhere()
        if self.distance(self.player) <= 1:
            if self.cooldown:
                self.cooldown -= 1
            else:
                self.player.hurt(7 if self.player.sleeping else 2)
                self.cooldown = 5


class Skeleton(Creature):
    tile = TILE["skeleton"]
    achievement = "defeat_skeleton"

    def __init__(self, land: Land, x: int, y: int, player: Player):
        super().__init__(land, x, y, health=3)
        self.player = player
        self.reload = 0

    def update(self) -> None:
        if self.health <= 0:
            self.land.remove(self)
        self.reload = max(0, self.reload - 1)
        uniform, distance = self.dice.uniform, self.distance(self.player)
        if distance <= 3:
            dx, dy = self.toward(self.player, uniform() < 0.6)
            if self.move(-dx, -dy):
                return
        if distance <= 5 and uniform() < 0.5:
            self._shoot(*self.toward(self.player))
        elif distance <= 8 and uniform() < 0.3:
            self.move(*self.toward(self.player, uniform() < 0.6))
        elif uniform() < 0.2:
            self.move_anywhere()

    def _shoot(self, dx: int, dy: int) -> None:
        if self.reload == 0 and (dx or dy) and self.free(dx, dy, Arrow.walkable):
            self.land.add(Arrow(self.land, self.x + dx, self.y + dy, (dx, dy)))
            self.reload = 4


class Arrow(Creature):
    walkable = _WALKABLE | {TILE["water"], TILE["lava"]}

    def __init__(self, land: Land, x: int, y: int, facing: tuple[int, int]):
        super().__init__(land, x, y)
        self.facing = facing
        self.tile = TILE[f"arrow-{_FACING[facing]}"]

    def update(self) -> None:
        land, target = self.land, self.cell + self.facing[0] * HEIGHT + self.facing[1]
        if target in land.occupants:
            land.occupants[target].hurt(2)
            land.remove(self)
        elif land.materials[target] not in self.walkable:
            land.remove(self)
            if land.materials[target] in (TILE["table"], TILE["furnace"]):
                land.materials[target] = TILE["path"]
        else:
            land.move(self, *self.facing)


class Plant(Creature):
    tile = TILE["plant"]

    def __init__(self, land: Land, x: int, y: int):
        super().__init__(land, x, y, health=1)
        self.grown = 0

    @property
    def ripe(self) -> bool:
        return self.grown > 300

    def pick(self) -> None:
        self.grown = 0
        self._look()

    def update(self) -> None:
        self.grown += 1
        self._look()
        neighbours = (self.land.occupants.get(self.cell + dx * HEIGHT + dy) for dx, dy in _ANY_DIRECTION)
        if any(isinstance(neighbour, Zombie | Skeleton | Cow) for neighbour in neighbours):
            self.hurt(1)
        if self.health <= 0:
            self.land.remove(self)

    def _look(self) -> None:
        self.tile = self.land.tiles[self.cell] = TILE["plant-ripe" if self.ripe else "plant"]


class Game:
    """One episode: the state of stock's `Env` between two steps."""

    def __init__(self, seed: int):
        """`seed` is the one that stock gives its first episode, a hash of its own."""
        self.steps = 0
        self.daylight = _daylight(0)
        self.unlocked: set[str] = set()
        dice = Dice(seed)
        self.land = Land(dice)
        self.player = Player(self.land, terrain.AREA[0] // 2, terrain.AREA[1] // 2)
        self._health_before = self.player.health
        self.land.add(self.player)
        materials, creatures = terrain.generate(dice.state, (self.player.x, self.player.y))
        self.land.grid(self.land.materials)[...] = materials
        kinds = {terrain.COW: Cow, terrain.ZOMBIE: Zombie, terrain.SKELETON: Skeleton}
        for kind, x, y in creatures:
            self.land.add(kinds[kind](self.land, x, y, self.player))

    def step(self, action: str) -> tuple[float, tuple[str, ...]]:
        """Returns the reward and the achievements unlocked for the first time, in crafter's order."""
        self.steps += 1
        self.daylight = _daylight(self.steps)
        player = self.player
        # The player has come first, and so has the first turn. Who comes during a step has no turn in it.
        _, *others = self.land.creatures
        player.update(action)
        x, y = player.x, player.y
        for creature in others:
            if abs(creature.x - x) + abs(creature.y - y) < _NEAR:
                creature.update()
        if self.steps % 10 == 0:
            self._balance()
        reward = (player.health - self._health_before) / 10
        self._health_before = player.health
        unlocked = tuple(name for name, count in player.achievements.items() if count and name not in self.unlocked)
        if unlocked:
            self.unlocked.update(unlocked)
            reward += 1.0
        return reward, unlocked

    def _balance(self) -> None:
        """Let creatures appear and disappear, chunk by chunk, towards the numbers that suit the place and hour."""
        grass, path = self._space("grass"), self._space("path")
        zombies, cows = int(3.5 - 3 * self.daylight), int(1.5 + self.daylight)
        for chunk, creatures in list(self.land.chunks.items()):
            kinds = [type(creature) for creature in creatures]
            at_least = 0 if grass[chunk] < 50 else zombies
            if not at_least <= kinds.count(Zombie) <= zombies:
                self._balance_kind(chunk, Zombie, "grass", at_least, (6, 0), (0.3, 0.4))
            at_least = 0 if path[chunk] < 6 else 1
            if not at_least <= kinds.count(Skeleton) <= 2:
                self._balance_kind(chunk, Skeleton, "path", at_least, (7, 7), (0.1, 0.1))
            at_least = 0 if grass[chunk] < 30 else 1
            if not at_least <= kinds.count(Cow) <= cows:
                self._balance_kind(chunk, Cow, "grass", at_least, (5, 5), (0.01, 0.1))

    def _balance_kind(self, chunk, kind, material, at_least, distances, probabilities) -> None:
        """There are too few or too many of a kind in a chunk: perhaps one appears or disappears.

        `distances` are how far from the player it has to be, and `probabilities` how likely it is, to do so.
        """
        dice, player = self.land.dice, self.player
        present = [creature for creature in self.land.chunks[chunk] if type(creature) is kind]
        appears = len(present) < at_least
        if dice.uniform() >= probabilities[0 if appears else 1]:
            return
        if appears:
            places = np.argwhere(self._region(chunk) == TILE[material])
            column, row = places[dice.below(len(places))].tolist()
            creature = kind(self.land, chunk[0] * _CHUNK + column, chunk[1] * _CHUNK + row, player)
            if creature.cell not in self.land.occupants and player.distance(creature) >= distances[0]:
                self.land.add(creature)
        else:
            creature = present[dice.below(len(present))]
            if player.distance(creature) >= distances[1]:
                self.land.remove(creature)

    def _region(self, chunk: tuple[int, int]) -> np.ndarray:
        x, y = chunk[0] * _CHUNK, chunk[1] * _CHUNK
        return self.land.grid(self.land.materials)[x : x + _CHUNK, y : y + _CHUNK]

    def _space(self, material: str) -> dict[tuple[int, int], int]:
        """How many cells of each chunk are of a material."""
        cells = self.land.grid(self.land.materials) == TILE[material]
        columns, rows = np.arange(0, cells.shape[0], _CHUNK), np.arange(0, cells.shape[1], _CHUNK)
        counts = np.add.reduceat(np.add.reduceat(cells, columns, axis=0, dtype=np.int64), rows, axis=1)
        return {(x, y): count for x, line in enumerate(counts.tolist()) for y, count in enumerate(line)}


def _daylight(steps: int) -> float:
    """From 0 to 1, with a period of 300 steps. numpy's cosine, as in stock: others may differ in the last bit."""
    progress = (steps / 300) % 1 + 0.3
    return float(1 - np.abs(np.cos(np.pi * progress)) ** 3)
