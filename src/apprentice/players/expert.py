"""The scripted teacher: plays Crafter from what the player has seen, by an ordered list of goals."""

import numba
import numpy as np

from apprentice.world.observation import TILES, VIEW, Observation

_CODE = {name: code for code, name in enumerate(TILES)}
_UNKNOWN = 255
_AREA, _PAD = 64, 9
_WIDTH = _AREA + 2 * _PAD
"""The remembered map is flat, x major, with a rim of void, so that no step needs a bounds check."""
_MOVES = {"move_left": -_WIDTH, "move_right": _WIDTH, "move_up": -1, "move_down": 1}
"""Each move as a step in the flat map; their order settles every tie."""
_STEPS = np.array(list(_MOVES.values()))
_FAR = 1 << 20

_TOOLS = {
    "wood_pickaxe": ("wood",),
    "wood_sword": ("wood",),
    "stone_pickaxe": ("wood", "stone"),
    "stone_sword": ("wood", "stone"),
    "iron_pickaxe": ("wood", "coal", "iron"),
    "iron_sword": ("wood", "coal", "iron"),
}
"""What each tool takes, one of each, in the order in which they are made (crafter/data.yaml, `make`)."""
_TABLE_WOOD, _FURNACE_STONE = 2, 4
_FIRST_WOOD = 4
"""Wood for the first table and both wooden tools."""
_OUT_OF_VIEW = 20
"""Steps by which a target only remembered counts as farther: who sees just the picture can follow the rest."""
_DARK = 0.5
"""Below this daylight two zombies and more are kept in every chunk of grass (crafter/env.py, `_balance_chunk`)."""


def _tiles(*names: str) -> np.ndarray:
    table = np.zeros(256, bool)
    table[[_CODE[name] for name in names]] = True
    return table


_GRASS = _tiles("grass")
_WALKABLE = _tiles("grass", "sand", "path")
_MOUNTAIN = _tiles("stone", "path", "coal", "iron", "diamond", "lava")
_PLANTS = _tiles("plant", "plant-ripe")
_WALKERS = _tiles("player", "cow", "zombie", "skeleton")
_CREATURES = _tiles("cow", "zombie", "skeleton", "arrow-left", "arrow-right", "arrow-up", "arrow-down")
_UNDER = np.full(256, _CODE["grass"], np.uint8)
"""The material on which a walker stands, where it had not been seen before."""
_UNDER[_CODE["skeleton"]] = _CODE["path"]

_NEARBY = np.add.outer(np.arange(-5, 6) * _WIDTH, np.arange(-5, 6)).ravel()
_AROUND = np.add.outer(np.arange(-1, 2) * _WIDTH, np.arange(-1, 2)).ravel()
_WITHIN_TWO = np.array([x * _WIDTH + y for x in range(-2, 3) for y in range(-2, 3) if 0 < abs(x) + abs(y) <= 2])


def _room(cells: tuple[int, ...], walls: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    doors = {cell + step for cell in cells for step in _STEPS} - set(cells) - set(walls)
    return np.array(cells), np.array(walls, int), np.array(sorted(doors))


_ROOMS = (
    _room((0, _WIDTH), (-1, 1, _WIDTH - 1, _WIDTH + 1)),
    _room((0, 1), (-_WIDTH, _WIDTH, 1 - _WIDTH, 1 + _WIDTH)),
    _room((0, 1, _WIDTH, _WIDTH + 1), ()),
)
"""Rooms to hide in: cells, walls (must be closed already) and doors (can be closed with a stone from inside).

One turns towards a free cell only by walking, so a door needs a cell straight across: a single cell can have none."""


@numba.njit(cache=True)
def _sources(targets, free, cost, penalty):
    """Steps until the player faces a target, for the cells from which it takes at most one; elsewhere _FAR."""
    value = np.full(len(cost), _FAR, np.int32)
    for cell in np.flatnonzero(targets):
        for step in _STEPS:
            if not free[cell]:
                value[cell - step] = min(value[cell - step], penalty[cell])
            elif cost[cell - step] > 0:
                before = cell - 2 * step
                value[before] = min(value[before], cost[cell - step] + penalty[cell])
    return value


@numba.njit(cache=True)
def _spread(value, cost):
    """Lower `value` to the cost of the cheapest way from each cell to a source (`cost`: to enter a cell, 0 bars it)."""
    size = len(cost)
    queue = np.empty(size, np.int32)
    queued = np.zeros(size, np.bool_)
    head = count = 0
    for cell in range(size):
        if value[cell] < _FAR and cost[cell] > 0:
            queue[count] = cell
            queued[cell] = True
            count += 1
    while count:
        cell = queue[head]
        head = (head + 1) % size
        count -= 1
        queued[cell] = False
        for step in _STEPS:
            before = cell - step
            if cost[before] > 0 and value[cell] + cost[cell] < value[before]:
                value[before] = value[cell] + cost[cell]
                if not queued[before]:
                    queue[(head + count) % size] = before
                    queued[before] = True
                    count += 1
    return value


def script(seed: int) -> "Expert":
    """The player of an episode on this world. It draws nothing, so the seed is not used."""
    return Expert()


class Expert:
    """Plays one episode; its actions follow from the observations it was given and nothing else.

    It never assumes that its last action was executed: the caller may have taken another.
    """

    plan: str
    """The current goal in words."""

    def __init__(self):
        self.plan = ""
        self._map = np.zeros(_WIDTH * _WIDTH, np.uint8)
        self._grid(self._map)[_PAD:-_PAD, _PAD:-_PAD] = _UNKNOWN
        self._creatures = np.zeros(_WIDTH * _WIDTH, np.uint8)
        self._now: Observation | None = None
        self._eaten_plant = self._placed_stone = self._defeated_skeleton = False

    def act(self, observation: Observation) -> str:
        """The name of the action to take now."""
        self._see(observation)
        goals = (
            self._stay_asleep,
            self._fight,
            self._recover,
            self._sleep,
            self._drink,
            self._eat,
            self._craft,
            self._sapling,
            self._wooden_tools,
            self._stone_tools,
            self._furnace,
            self._place_a_stone,
            self._iron_tools,
            self._ores,
            self._fence,
            self._plant,
            self._look_for_ores,
            self._wait_for_plant,
            self._explore,
        )
        for goal in goals:
            action = goal()
            if action:
                return action
        return self._do("noop", "wait")

    # What it has seen.

    @staticmethod
    def _grid(flat: np.ndarray) -> np.ndarray:
        return flat.reshape(_WIDTH, _WIDTH)

    def _see(self, now: Observation) -> None:
        x, y = now.position
        left, top = x + _PAD - VIEW[0] // 2, y + _PAD - VIEW[1] // 2
        window = (slice(left, left + VIEW[0]), slice(top, top + VIEW[1]))
        seen, known = now.view.T, self._grid(self._map)[window]
        ground = np.where(_WALKERS[seen] & ~_WALKABLE[known], _UNDER[seen], seen)
        ground = np.where((_WALKERS[seen] & _WALKABLE[known]) | (_CREATURES & ~_WALKERS)[seen], known, ground)
        self._infer(now, (known == _CODE["plant-ripe"]) & (ground == _CODE["plant"]))

        self._now = now
        self._vitals, self._owned = now.vitals, now.inventory
        self._here = (x + _PAD) * _WIDTH + y + _PAD
        self._facing = now.facing[0] * _WIDTH + now.facing[1]
        self._front = self._here + self._facing
        self._grid(self._map)[window] = ground
        self._creatures[self._creatures != _CODE["cow"]] = 0
        self._grid(self._creatures)[window] = np.where(_CREATURES[seen], seen, 0)
        self._in_view = np.zeros(len(self._map), bool)
        self._grid(self._in_view)[window] = True
        self._penalty = np.where(self._in_view, 0, _OUT_OF_VIEW).astype(np.int32)
        self._free = _WALKABLE[self._map] & (self._creatures == 0)
        self._fences = self._stones_around_plants()
        self._cost = self._costs()

    def _infer(self, now: Observation, eaten: np.ndarray) -> None:
        """Note the achievements that leave no trace in the inventory."""
        self._eaten_plant |= bool(eaten.any())
        before = self._now
        if before is None:
            return
        tools = all(now.inventory[tool] == before.inventory[tool] for tool in _TOOLS)
        self._placed_stone |= tools and now.inventory["stone"] == before.inventory["stone"] - 1
        if before.position == now.position and before.facing == now.facing:
            column, row = VIEW[0] // 2 + now.facing[0], VIEW[1] // 2 + now.facing[1]
            skeletons = now.view[row - 1 : row + 2, column - 1 : column + 2] == _CODE["skeleton"]
            self._defeated_skeleton |= bool(before.view[row, column] == _CODE["skeleton"] and not skeletons.any())

    def _stones_around_plants(self) -> np.ndarray:
        fences = np.zeros(len(self._map), bool)
        if not self._eaten_plant:
            fences[(np.flatnonzero(self._map == _CODE["plant"])[:, None] + _STEPS).ravel()] = True
        return fences & (self._map == _CODE["stone"])

    def _costs(self) -> np.ndarray:
        """Steps it takes to enter each cell, more where it is dangerous, 0 where it is barred."""
        steps = np.zeros(256, np.int32)
        steps[_WALKABLE] = 1
        if self._now.daylight < _DARK:
            steps[_GRASS] = 4
        if self._owned["wood_pickaxe"]:
            steps[[_CODE["stone"], _CODE["coal"], _CODE["tree"]]] = 3
            steps[_CODE["water"]] = 5 if self._owned["stone"] else 0
        if self._owned["stone_pickaxe"]:
            steps[_CODE["iron"]] = 3
        if self._owned["iron_pickaxe"]:
            steps[_CODE["diamond"]] = 3
        cost = steps[self._map]
        cost[(self._creatures > 0) | self._fences] = 0
        for lava in np.flatnonzero(self._map == _CODE["lava"])[:, None] + _STEPS:
            cost[lava] += 8 * (cost[lava] > 0)
        for zombie in np.flatnonzero(self._creatures == _CODE["zombie"]):
            if self._distance(zombie) <= 4:
                cost[zombie + _WITHIN_TWO] += 8 * (cost[zombie + _WITHIN_TWO] > 0)
        cost[self._here] = 1
        return cost

    def _distance(self, cell: int) -> int:
        (x, y), (here_x, here_y) = divmod(int(cell), _WIDTH), divmod(self._here, _WIDTH)
        return abs(x - here_x) + abs(y - here_y)

    def _is(self, name: str) -> np.ndarray:
        code = _CODE[name]
        return self._creatures == code if _CREATURES[code] else (self._map == code) & (self._creatures == 0)

    def _near(self, name: str) -> bool:
        """Whether the player can craft with a `name` here (at the map's edge crafter's `World.nearby` fails)."""
        x, y = divmod(self._here, _WIDTH)
        return x > _PAD and y > _PAD and bool((self._map[self._here + _AROUND] == _CODE[name]).any())

    def _beside(self, name: str) -> np.ndarray:
        """The cells from which one can craft with a `name`."""
        cells = np.zeros(len(self._map), bool)
        cells[(np.flatnonzero(self._map == _CODE[name])[:, None] + _AROUND).ravel()] = True
        return cells & (self._cost > 0)

    def _enclosed(self) -> bool:
        """Whether nothing can walk up to the player."""
        found, todo = {self._here}, [self._here]
        while todo:
            cell = todo.pop()
            for step in _MOVES.values():
                material = self._map[cell + step]
                if cell + step not in found and (_WALKABLE[material] or material == _UNKNOWN):
                    found.add(cell + step)
                    todo.append(cell + step)
            if len(found) > 4:
                return False
        return True

    # How it gets there.

    def _do(self, action: str, plan: str) -> str:
        self.plan = plan
        return action

    def _reach(self, targets: np.ndarray, action: str, plan: str, within: int = _FAR) -> str | None:
        """Walk, dig and bridge until facing the nearest target, then do `action`; None if there is no way."""
        if within < 0 or not targets.any():
            return None
        if targets[self._front]:
            return self._do(action, plan)
        value = _spread(_sources(targets, self._free, self._cost, self._penalty), self._cost)
        return self._follow(value, targets, plan, within)

    def _stand(self, cells: np.ndarray, plan: str, within: int = _FAR) -> str | None:
        """Go to the nearest of `cells`; None if there is no way or the player is there."""
        if cells[self._here]:
            return None
        value = np.where(cells, 0, _FAR).astype(np.int32)
        return self._follow(_spread(value, self._cost), np.zeros(len(cells), bool), plan, within)

    def _follow(self, value: np.ndarray, targets: np.ndarray, plan: str, within: int) -> str | None:
        least, chosen = min(within + 1, _FAR), None
        for move, step in _MOVES.items():
            cell = self._here + step
            if targets[cell] and not self._free[cell]:
                way = self._penalty[cell]
            elif self._cost[cell] == 0:
                continue
            else:
                way = self._cost[cell] + value[cell]
                if targets[cell + step] and self._free[cell + step]:
                    way = min(way, self._cost[cell] + self._penalty[cell + step])
            if way < least:
                least, chosen = way, move
        if chosen is None:
            return None
        cell = self._here + _MOVES[chosen]
        blocked = cell == self._front and self._cost[cell] > 0 and not (self._free[cell] or targets[cell])
        return self._do(self._clear() if blocked else chosen, plan)

    def _clear(self) -> str:
        """Make the cell in front passable: a stone turns water into something that can be mined."""
        return "place_stone" if self._map[self._front] == _CODE["water"] else "do"

    def _place(self, action: str, plan: str, near: np.ndarray | None = None) -> str | None:
        """Do `action` on a free cell in front, standing on one of the cells `near` if given."""
        near = np.ones(len(self._map), bool) if near is None else near
        if self._free[self._front] and near[self._here]:
            return self._do(action, plan)
        moves = {move: self._here + step for move, step in _MOVES.items() if self._free[self._here + step]}
        for move, cell in moves.items():
            if near[cell] and self._free[cell + _MOVES[move]]:
                return self._do(move, plan)
        if self._map[self._front] == _CODE["tree"] or (self._cost[self._front] > 0 and not self._free[self._front]):
            return self._do(self._clear(), plan)
        return self._do(next(iter(moves)), plan) if moves else None

    def _search(self, plan: str, among: np.ndarray | None = None) -> str | None:
        """Go where something unknown comes into view, rather beside tiles `among`: straight on, else to the nearest."""
        along_x = abs(self._facing) > 1
        beyond = VIEW[0] // 2 + 1 if along_x else VIEW[1] // 2 + 1
        edge = self._here + self._facing * (beyond - 1) + (1 if along_x else _WIDTH) * np.arange(-1, 2)
        promising = (among is None or among[self._map[edge]].any()) and (
            self._map[edge + self._facing] == _UNKNOWN
        ).all()
        if promising and self._free[self._front] and self._cost[self._front] == 1:
            return self._do(next(move for move, step in _MOVES.items() if step == self._facing), plan)
        kept = self._penalty
        if among is not None:
            wanted = among[self._map]
            wanted = wanted | np.roll(wanted, 1) | np.roll(wanted, -1)
            wanted = wanted | np.roll(wanted, _WIDTH) | np.roll(wanted, -_WIDTH)
            self._penalty = kept + np.where(wanted, 0, 15).astype(np.int32)
        action = self._reach(self._map == _UNKNOWN, "noop", plan)
        self._penalty = kept
        return action

    def _rest(self) -> str:
        return "sleep" if self._vitals["energy"] < 9 else "noop"

    def _hide(self, plan: str, allowed: np.ndarray | None = None) -> str | None:
        """Rest in a room that is cheap to reach and to close with stones; None if there is none."""
        if self._enclosed():
            return self._do(self._rest(), plan)
        room = self._cheapest_room(allowed)
        if room is None:
            return None
        cells, walls, doors = room
        kept = self._cost.copy()
        if self._here not in cells:
            inside = np.zeros(len(self._map), bool)
            inside[cells] = True
            self._cost[walls] = 0
            action = self._stand(inside, plan)
        else:
            solid, open_doors = cells[~self._free[cells] & (cells != self._here)], doors[self._free[doors]]
            targets = np.zeros(len(self._map), bool)
            targets[solid if len(solid) and self._front not in open_doors else open_doors] = True
            self._cost[:] = 0
            self._cost[cells] = kept[cells]
            action = self._reach(targets, "do" if targets[solid].any() else "place_stone", plan)
        self._cost = kept
        return action

    def _cheapest_room(self, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Cells, walls and doors of a room nearby, by the steps to go there, dig it and close its doors."""
        safe = (self._map != _UNKNOWN) & (self._map != _CODE["lava"]) & (self._creatures == 0)
        closing = np.where(safe, np.where(self._free, 2, 0), _FAR)
        digging = np.where(self._free, 0, np.where(self._is("stone") & (self._cost > 0), 3, _FAR))
        digging[self._here] = 0
        if allowed is not None:
            digging[~allowed] = _FAR
        way = np.full(len(self._map), _FAR, np.int32)
        way[self._here] = 0
        way = np.where(self._cost > 0, _spread(way, self._cost) + self._cost, _FAR)
        way[self._here] = 1
        anchors, best, least = self._here + _NEARBY, None, _FAR
        for cells, walls, doors in _ROOMS:
            cells, walls, doors = anchors[:, None] + cells, anchors[:, None] + walls, anchors[:, None] + doors
            price = np.where((cells == self._here).any(1), 0, way[doors].min(1))
            price = price + digging[cells].sum(1) + closing[doors].sum(1)
            stones = self._owned["stone"] + (digging[cells] == 3).sum(1)
            price[(self._free[doors].sum(1) > stones) | (closing[walls] > 0).any(1)] = _FAR
            cheapest = int(price.argmin())
            if price[cheapest] < least:
                least, best = price[cheapest], (cells[cheapest], walls[cheapest], doors[cheapest])
        return best

    # Its goals: each gives an action, or None to leave it to the next.

    def _stay_asleep(self) -> str | None:
        return self._do("sleep", "sleep") if self._now.sleeping else None

    def _fight(self) -> str | None:
        hunt = not self._defeated_skeleton and self._vitals["health"] >= 5
        return self._reach(self._is("zombie"), "do", "fight the zombie", 0) or self._reach(
            self._is("skeleton"), "do", "fight the skeleton", 3 if hunt else 0
        )

    def _recover(self) -> str | None:
        if min(self._vitals["food"], self._vitals["drink"]) <= 1:
            return None
        enough = 6 if self._enclosed() else 3
        return self._hide("hide and recover") if self._vitals["health"] <= enough else None

    def _sleep(self) -> str | None:
        energy, light = self._vitals["energy"], self._now.daylight
        quiet = not (self._is("zombie") | self._is("skeleton")).any()
        if energy < 9 and light > 0.85 and quiet and self._vitals["health"] >= 8 and not self._owned["stone_pickaxe"]:
            return self._do("sleep", "take a nap")
        if energy <= (3 if light < _DARK else 2) or (energy < 9 and self._enclosed()):
            return self._hide("sleep in a shelter") or (self._do("sleep", "sleep") if energy == 0 else None)
        return None

    def _worth(self, vital: int) -> int:
        """How many steps to go for food or water."""
        return _FAR if vital <= 3 else 20 if vital <= 4 else 8 if vital <= 6 else -1

    def _drink(self) -> str | None:
        drink = self._vitals["drink"]
        if drink < 9 and self._map[self._front] == _CODE["water"]:
            return self._do("do", "drink")
        action = self._reach(self._is("water"), "do", "go to the water to drink", self._worth(drink))
        return action or (self._search("look for water") if drink <= 3 else None)

    def _eat(self) -> str | None:
        food = self._vitals["food"]
        ripe = self._is("plant-ripe")
        action = None if self._eaten_plant else self._reach(ripe, "do", "eat the ripe plant")
        action = action or self._reach(self._is("cow") | ripe, "do", "go to the cow to eat", self._worth(food))
        return action or (self._search("look for a cow", _GRASS) if food <= 3 else None)

    def _craft(self) -> str | None:
        for tool, takes in _TOOLS.items():
            possible = not self._owned[tool] and all(self._owned[item] for item in takes)
            if possible and self._near("table") and ("iron" not in takes or self._near("furnace")):
                return self._do(f"make_{tool}", f"make the {tool.replace('_', ' ')}")
        return None

    def _sapling(self) -> str | None:
        if self._owned["sapling"]:
            ready = self._is("grass")[self._front]
            return self._do("place_plant", "plant the sapling") if ready else None
        if self._owned["wood_pickaxe"] or self._owned["wood"] or _PLANTS[self._map].any():
            return None
        return self._reach(self._is("grass"), "do", "collect a sapling from the grass")

    def _wood(self, amount: int) -> str | None:
        if self._owned["wood"] >= amount:
            return None
        return self._reach(self._is("tree"), "do", "go to the tree to collect wood") or self._search("look for trees")

    def _stone(self, amount: int) -> str | None:
        if self._owned["stone"] >= amount:
            return None
        stones = self._is("stone") & ~self._fences
        return self._reach(stones, "do", "collect stone") or self._search("look for stone")

    def _table(self, wood: int) -> str | None:
        """Go to a table with some wood, or place one once there is that much `wood`."""
        if self._owned["wood"]:
            action = self._reach(self._is("table"), "noop", "go to the table", 20)
            if action:
                return action
        return self._wood(wood) or self._place("place_table", "place a table")

    def _wooden_tools(self) -> str | None:
        if self._owned["wood_pickaxe"] and self._owned["wood_sword"]:
            return None
        return self._table(_FIRST_WOOD)

    def _stone_tools(self) -> str | None:
        if self._owned["stone_pickaxe"] and self._owned["stone_sword"]:
            return None
        return self._wood(1) or self._stone(_FURNACE_STONE + 1) or self._table(_TABLE_WOOD + 2)

    def _furnace(self) -> str | None:
        if self._is("furnace").any() or self._missing_iron_tools() == 0:
            return None
        return (
            self._stone(_FURNACE_STONE)
            or self._stand(self._beside("table"), "go to the table", 20)
            or self._place("place_furnace", "place a furnace", self._beside("table") if self._near("table") else None)
        )

    def _place_a_stone(self) -> str | None:
        if self._placed_stone or not self._owned["stone"]:
            return None
        return self._place("place_stone", "place a stone")

    def _missing_iron_tools(self) -> int:
        return sum(not self._owned[tool] for tool in ("iron_pickaxe", "iron_sword"))

    def _iron_tools(self) -> str | None:
        if not (self._missing_iron_tools() and self._owned["iron"] and self._owned["coal"]):
            return None
        if not self._owned["wood"]:
            return self._wood(1)
        both = self._beside("table") & self._beside("furnace")
        action = self._stand(both, "go to the table and the furnace", 40) if both.any() else None
        if action:
            return action
        if not self._near("table"):
            stock = self._stone(_FURNACE_STONE) or self._wood(_TABLE_WOOD + 1)
            return stock or self._place("place_table", "place a table")
        table = self._beside("table")
        return self._stone(_FURNACE_STONE) or self._place("place_furnace", "place a furnace", table)

    def _ores(self) -> str | None:
        missing = self._missing_iron_tools()
        wanted = {
            "diamond": self._owned["iron_pickaxe"] and not self._owned["diamond"],
            "iron": self._owned["iron"] < missing,
            "coal": self._owned["coal"] < missing,
        }
        for within in (10, _FAR):
            for ore in (ore for ore, want in wanted.items() if want):
                action = self._reach(self._is(ore), "do", f"collect {ore}", within)
                if action:
                    return action
        return None

    def _fence(self) -> str | None:
        """Close the sides of a plant in view, so that no cow or zombie comes near enough to trample it."""
        if self._eaten_plant or not self._owned["stone"]:
            return None
        sides = np.zeros(len(self._map), bool)
        sides[(np.flatnonzero(_PLANTS[self._map] & self._in_view)[:, None] + _STEPS).ravel()] = True
        return self._reach(sides & self._free, "place_stone", "fence the plant with stones", 12)

    def _plant(self) -> str | None:
        """Plant another sapling where none is left, with the stones for its fence at hand."""
        if self._eaten_plant or _PLANTS[self._map].any():
            return None
        if not self._owned["sapling"]:
            collect = self._reach(self._is("grass"), "do", "collect a sapling from the grass")
            return self._stone(5) or collect
        return self._stone(5) or self._reach(self._is("grass"), "place_plant", "plant the sapling")

    def _look_for_ores(self) -> str | None:
        if self._owned["diamond"] and self._owned["iron_sword"]:
            return None
        if self._owned["stone"] < 9 and self._is("stone")[self._front] and not self._fences[self._front]:
            return self._do("do", "collect stone")
        return self._search("look for ores", _MOUNTAIN)

    def _wait_for_plant(self) -> str | None:
        """Plants grow only while the player is near (crafter/env.py, `step`): hide where one is in view."""
        plants = np.flatnonzero(_PLANTS[self._map])
        if self._eaten_plant or not len(plants):
            return None
        near = np.zeros(len(self._map), bool)
        for x, y in (divmod(int(plant), _WIDTH) for plant in plants):
            self._grid(near)[x - 4 : x + 5, y - 3 : y + 4] = True
        plan = "wait for the plant to ripen"
        if not near[self._here]:
            return self._stand(near & (self._cost > 0), plan)
        return self._hide(plan, near) or self._stone(9)

    def _explore(self) -> str | None:
        return self._search("explore")
