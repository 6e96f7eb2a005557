"""The scripted teacher: plays Crafter from what the player has seen, by an ordered list of goals."""

import numba
import numpy as np

from apprentice.world import TILES, VIEW, Observation

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
"""What each tool takes, one of each (crafter/data.yaml); in the order in which they are made."""
_TABLE_WOOD, _FURNACE_STONE = 2, 4


def _tiles(*names: str) -> np.ndarray:
    table = np.zeros(256, bool)
    table[[_CODE[name] for name in names]] = True
    return table


_WALKABLE = _tiles("grass", "sand", "path")
_MOUNTAIN = _tiles("stone", "path", "coal", "iron", "diamond", "lava")
_PLANTS = _tiles("plant", "plant-ripe")
_WALKERS = _tiles("player", "cow", "zombie", "skeleton")
_ARROWS = _tiles("arrow-left", "arrow-right", "arrow-up", "arrow-down")
_CREATURES = (_WALKERS | _ARROWS) & ~_tiles("player")
_UNDER = np.arange(256, dtype=np.uint8)
"""What to remember of a cell on which something walks: the material it probably stands on."""
_UNDER[_WALKERS] = _CODE["grass"]
_UNDER[_CODE["skeleton"]] = _CODE["path"]


def _room(cells: tuple[int, ...], must_be_closed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rim = {cell + step for cell in cells for step in _STEPS} - set(cells) - set(must_be_closed)
    return np.array(cells), np.array(must_be_closed, int), np.array(sorted(rim))


_ROOMS = (
    _room((0, _WIDTH), (-1, 1, _WIDTH - 1, _WIDTH + 1)),
    _room((0, 1), (-_WIDTH, _WIDTH, 1 - _WIDTH, 1 + _WIDTH)),
    _room((0, 1, _WIDTH, _WIDTH + 1), ()),
)
"""Shapes to sleep in: their cells, neighbours that must be closed, and the others, which can be closed from inside.

A player turns towards a free cell only by walking, so a single cell cannot be closed from inside."""
_NEARBY = np.add.outer(np.arange(-5, 6) * _WIDTH, np.arange(-5, 6)).ravel()
_NEARBY_STEPS = np.add.outer(abs(np.arange(-5, 6)), abs(np.arange(-5, 6))).ravel()


@numba.njit(cache=True)
def _facing_sources(targets, free, cost, penalty):
    """Per cell the steps until the player, standing there, faces a target next to it (or _FAR)."""
    value = np.full(len(cost), _FAR, np.int32)
    for cell in range(len(cost)):
        if not targets[cell]:
            continue
        for step in _STEPS:
            if not free[cell]:
                value[cell - step] = min(value[cell - step], penalty[cell])
            elif cost[cell - step] > 0:  # one cannot turn towards a free cell without entering it
                before = cell - 2 * step
                value[before] = min(value[before], cost[cell - step] + penalty[cell])
    return value


@numba.njit(cache=True)
def _spread(value, cost):
    """Lower `value` until it is, for each cell, the cost of the cheapest way to a source; `cost` to enter, 0: never."""
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


class Expert:
    """Plays one episode; its actions follow from the observations it was given and nothing else."""

    plan: str
    """The current goal in words."""

    def __init__(self):
        self.plan = ""
        self._map = np.zeros(_WIDTH * _WIDTH, np.uint8)
        self._grid[_PAD:-_PAD, _PAD:-_PAD] = _UNKNOWN
        self._creatures = np.zeros(_WIDTH * _WIDTH, np.uint8)
        self._last: Observation | None = None
        self._woken = self._eaten_plant = self._placed_stone = self._defeated_skeleton = False

    def act(self, observation: Observation) -> str:
        """The name of the action to take now."""
        self._see(observation)
        for goal in (
            self._stay_asleep,
            self._fight,
            self._drink,
            self._eat,
            self._recover,
            self._sleep,
            self._craft,
            self._sapling,
            self._wood_tools,
            self._stone_tools,
            self._furnace,
            self._place_a_stone,
            self._iron_tools,
            self._ores,
            self._farm,
            self._search_ores,
            self._explore,
        ):
            action = goal()
            if action:
                return action
        self.plan = "wait"
        return "noop"

    # What it has seen.

    @property
    def _grid(self) -> np.ndarray:
        return self._map.reshape(_WIDTH, _WIDTH)

    def _see(self, observation: Observation) -> None:
        x, y = observation.position
        left, top = x + _PAD - VIEW[0] // 2, y + _PAD - VIEW[1] // 2
        window = (slice(left, left + VIEW[0]), slice(top, top + VIEW[1]))
        seen, known = observation.view.T, self._grid[window]
        ground = np.where(_WALKERS[seen] & ~_WALKABLE[known], _UNDER[seen], np.where(_CREATURES[seen], known, seen))
        here = VIEW[0] // 2, VIEW[1] // 2
        ground[here] = known[here] if _WALKABLE[known[here]] else _CODE["grass"]
        self._infer(observation, (known == _CODE["plant-ripe"]) & (ground == _CODE["plant"]))
        self._grid[window] = ground
        self._creatures[self._creatures != _CODE["cow"]] = 0
        self._creatures.reshape(_WIDTH, _WIDTH)[window] = np.where(_CREATURES[seen], seen, 0)
        self._in_view = np.zeros((_WIDTH, _WIDTH), bool)
        self._in_view[window] = True
        self._in_view = self._in_view.ravel()
        self._penalty = np.where(self._in_view, 0, 6).astype(np.int32)

        self._last = observation
        self._vitals, self._owned = observation.vitals, observation.inventory
        self._here = (x + _PAD) * _WIDTH + y + _PAD
        self._facing = observation.facing[0] * _WIDTH + observation.facing[1]
        self._front = self._here + self._facing
        self._free = _WALKABLE[self._map] & (self._creatures == 0)
        self._cost = self._costs()

    def _infer(self, now: Observation, eaten: np.ndarray) -> None:
        """Which of the achievements that leave no trace in the inventory have been unlocked since the last step."""
        self._eaten_plant |= bool(eaten.any())
        before = self._last
        if before is None:
            return
        self._woken |= before.sleeping and not now.sleeping and before.vitals["energy"] == 9
        self._placed_stone |= now.inventory["stone"] == before.inventory["stone"] - 1 and all(
            now.inventory[tool] == before.inventory[tool] for tool in _TOOLS
        )
        if before.position == now.position and before.facing == now.facing:
            column, row = VIEW[0] // 2 + now.facing[0], VIEW[1] // 2 + now.facing[1]
            skeleton = _CODE["skeleton"]
            around = now.view[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            self._defeated_skeleton |= bool(before.view[row, column] == skeleton and not (around == skeleton).any())

    def _costs(self) -> np.ndarray:
        """Steps it takes to enter each cell, 0 where the player must not or cannot go."""
        steps = np.zeros(256, np.int32)
        steps[_WALKABLE] = 1
        if self._owned["wood_pickaxe"]:
            steps[[_CODE["stone"], _CODE["coal"], _CODE["tree"]]] = 3
            if self._owned["stone"]:
                steps[_CODE["water"]] = 5
        if self._owned["stone_pickaxe"]:
            steps[_CODE["iron"]] = 3
        if self._owned["iron_pickaxe"]:
            steps[_CODE["diamond"]] = 3
        cost = steps[self._map]
        cost[self._creatures > 0] = 0
        lava = np.flatnonzero(self._map == _CODE["lava"])
        if len(lava):
            for step in _STEPS:
                cost[lava + step] += 8 * (cost[lava + step] > 0)
        cost[self._here] = 1
        return cost

    def _is(self, name: str) -> np.ndarray:
        code = _CODE[name]
        return self._creatures == code if _CREATURES[code] else (self._map == code) & (self._creatures == 0)

    def _near(self, name: str, distance: int = 1) -> bool:
        """Whether the player can craft with a `name` here (`World.nearby` of crafter fails at the map's edge)."""
        x, y = divmod(self._here, _WIDTH)
        square = self._grid[x - distance : x + distance + 1, y - distance : y + distance + 1]
        return x > _PAD and y > _PAD and bool((square == _CODE[name]).any())

    # How it gets there.

    def _reach(self, targets: np.ndarray, action: str, plan: str, within: int = _FAR) -> str | None:
        """Walk, dig and bridge until facing the nearest target, then do `action`; None if there is no way."""
        if not targets.any():
            return None
        if targets[self._front]:
            self.plan = plan
            return action
        value = _spread(_facing_sources(targets, self._free, self._cost, self._penalty), self._cost)
        return self._follow(value, targets, plan, within)

    def _stand(self, cells: np.ndarray, plan: str, within: int = _FAR) -> str | None:
        """Go to stand on the nearest of `cells`; None if there is no way or the player is there."""
        if cells[self._here]:
            return None
        value = np.where(cells, 0, _FAR).astype(np.int32)
        return self._follow(_spread(value, self._cost), np.zeros_like(self._free), plan, within)

    def _follow(self, value: np.ndarray, targets: np.ndarray, plan: str, within: int) -> str | None:
        least, chosen = min(within + 1, _FAR), None
        for move, step in _MOVES.items():
            cell = self._here + step
            if targets[cell] and not self._free[cell]:
                way = 0
            elif self._cost[cell] == 0:
                continue
            elif self._free[cell] and targets[cell + step] and self._free[cell + step]:
                way = self._cost[cell]
            else:
                way = self._cost[cell] + value[cell]
            if way < least:
                least, chosen = way, move
        if chosen is None:
            return None
        self.plan = plan
        cell = self._here + _MOVES[chosen]
        if cell != self._front or self._free[cell] or targets[cell] or self._cost[cell] == 0:
            return chosen
        return "place_stone" if self._map[cell] == _CODE["water"] else "do"

    def _place(self, action: str, plan: str, near: np.ndarray | None = None) -> str | None:
        """Do `action` on the free cell in front, standing on one of the cells `near`; walk until there is one."""
        near = np.ones_like(self._free) if near is None else near
        self.plan = plan
        if self._free[self._front] and near[self._here]:
            return action
        open_moves = {move: self._here + step for move, step in _MOVES.items() if self._free[self._here + step]}
        for move, cell in open_moves.items():
            if near[cell] and self._free[cell + _MOVES[move]]:
                return move
        for move, cell in open_moves.items():
            if near[cell]:
                return move
        for move, step in _MOVES.items():
            if self._cost[self._here + step] and not self._creatures[self._here + step]:
                return move if self._here + step != self._front or move in open_moves else "do"
        return None

    def _search(self, plan: str, within: np.ndarray | None = None) -> str | None:
        """Go where something unknown comes into view: straight on if possible, else the nearest such place."""
        reach = VIEW[0] // 2 + 1 if abs(self._facing) > 1 else VIEW[1] // 2 + 1
        side = 1 if abs(self._facing) > 1 else _WIDTH
        ahead = self._here + self._facing * reach + side * np.arange(-1, 2)
        last = self._map[self._here + self._facing * (reach - 1) + side * np.arange(-1, 2)]
        straight = self._free[self._front] and self._cost[self._front] == 1
        if straight and (self._map[ahead] == _UNKNOWN).all() and (within is None or within[last].any()):
            self.plan = plan
            return next(move for move, step in _MOVES.items() if step == self._facing)
        unknown = self._map == _UNKNOWN
        if within is not None:
            wanted = within[self._map]
            wanted = wanted | np.roll(wanted, 1) | np.roll(wanted, -1)
            wanted = wanted | np.roll(wanted, _WIDTH) | np.roll(wanted, -_WIDTH)
            kept, self._penalty = self._penalty, self._penalty + np.where(wanted, 0, 15).astype(np.int32)
            action = self._reach(unknown, "noop", plan)
            self._penalty = kept
            return action
        return self._reach(unknown, "noop", plan)

    def _enclosed(self) -> bool:
        """Whether nothing can walk up to the player."""
        found, todo = {self._here}, [self._here]
        while todo:
            cell = todo.pop()
            for step in _MOVES.values():
                if (
                    _WALKABLE[self._map[cell + step]] or self._map[cell + step] == _UNKNOWN
                ) and cell + step not in found:
                    found.add(cell + step)
                    todo.append(cell + step)
            if len(found) > 4:
                return False
        return True

    def _shelter(self, plan: str, inside: str, allowed: np.ndarray | None = None) -> str | None:
        """Go into a room that is cheap to close with stones, close it, then do `inside`."""
        if self._enclosed():
            self.plan = plan
            return inside
        room = self._best_room(allowed)
        if room is None:
            return None
        cells, rim = room
        self.plan = plan
        opening = rim[self._free[rim]]
        if self._here in cells:
            if self._front in opening:
                return "place_stone"
            targets = np.zeros_like(self._free)
            solid = cells[~self._free[cells] & (cells != self._here)]
            targets[solid if len(solid) else opening] = True
            kept, self._cost = self._cost, np.zeros_like(self._cost)
            self._cost[cells] = kept[cells]
            action = self._reach(targets, "do" if len(solid) else "place_stone", plan)
            self._cost = kept
            return action
        inside_room = np.zeros_like(self._free)
        inside_room[cells] = True
        return self._stand(inside_room, plan)

    def _best_room(self, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
        known = (self._map != _UNKNOWN) & (self._map != _CODE["lava"]) & (self._creatures == 0)
        closing = np.where(known, np.where(self._free, 2, 0), _FAR)
        digging = np.where(self._free, 0, np.where(known & (self._map == _CODE["stone"]) & (self._cost > 0), 3, _FAR))
        digging[self._here] = 0
        if allowed is not None:
            digging[~allowed] = _FAR
        anchors, best, least = self._here + _NEARBY, None, _FAR
        for cells, closed, rim in _ROOMS:
            inner, outer = anchors[:, None] + cells, anchors[:, None] + rim
            price = _NEARBY_STEPS + digging[inner].sum(1) + closing[outer].sum(1)
            price[self._free[outer].sum(1) > self._owned["stone"] + (digging[inner] == 3).sum(1)] = _FAR
            if len(closed):
                price[(closing[anchors[:, None] + closed] > 0).any(1)] = _FAR
            k = int(price.argmin())
            if price[k] < least:
                least, best = price[k], (inner[k], outer[k])
        return best

    # Its goals, in the order of `act`.

    def _stay_asleep(self) -> str | None:
        if self._last.sleeping:
            self.plan = "sleep"
            return "sleep"
        return None

    def _fight(self) -> str | None:
        strong = self._vitals["health"] >= 5
        action = self._reach(self._is("zombie"), "do", "fight the zombie", 3 if strong else 0)
        if action:
            return action
        near = 4 if strong and not self._defeated_skeleton else 0
        return self._reach(self._is("skeleton"), "do", "fight the skeleton", near)

    def _drink(self) -> str | None:
        drink = self._vitals["drink"]
        if drink < 9 and self._map[self._front] == _CODE["water"]:
            self.plan = "drink"
            return "do"
        if drink > 6:
            return None
        action = self._reach(self._is("water"), "do", "go to the water to drink", 8 if drink > 3 else _FAR)
        return action or (self._search("look for water") if drink <= 3 else None)

    def _eat(self) -> str | None:
        food = self._vitals["food"]
        ripe = self._reach(self._is("plant-ripe"), "do", "eat the ripe plant", _FAR if not self._eaten_plant else 8)
        if ripe and (food <= 6 or not self._eaten_plant):
            return ripe
        if food > 6:
            return None
        action = self._reach(self._is("cow"), "do", "go to the cow to eat", 8 if food > 3 else _FAR)
        return action or (self._search("look for a cow", _tiles("grass")) if food <= 3 else None)

    def _recover(self) -> str | None:
        if min(self._vitals[name] for name in ("food", "drink")) <= 1:
            return None
        if self._vitals["health"] <= 3 or (self._vitals["health"] <= 6 and self._enclosed()):
            return self._shelter("hide and recover", "sleep" if self._vitals["energy"] < 9 else "noop")
        return None

    def _sleep(self) -> str | None:
        energy, light = self._vitals["energy"], self._last.daylight
        quiet = not (self._is("zombie") | self._is("skeleton")).any()
        nap = energy < 9 and light > 0.85 and quiet and not self._owned["stone_pickaxe"]
        if nap and self._vitals["health"] >= 8:
            self.plan = "take a nap"
            return "sleep"
        if energy <= 2 or (light < 0.5 and energy <= 6) or (energy < 9 and self._enclosed()):
            action = self._shelter("sleep in a shelter", "sleep")
            if action is None and energy == 0:
                self.plan = "sleep"
                return "sleep"
            return action
        return None

    def _craft(self) -> str | None:
        if not self._near("table"):
            return None
        for tool, takes in _TOOLS.items():
            if self._owned[tool] or any(self._owned[item] < 1 for item in takes):
                continue
            if "iron" in takes and not self._near("furnace"):
                continue
            self.plan = f"make the {tool.replace('_', ' ')}"
            return f"make_{tool}"
        return None

    def _sapling(self) -> str | None:
        if self._owned["sapling"]:
            if self._owned["wood_sword"] and self._map[self._front] == _CODE["grass"] and self._free[self._front]:
                self.plan = "plant the sapling"
                return "place_plant"
            return None
        if not self._owned["wood_pickaxe"] and self._owned["wood"] == 0:
            return self._reach(self._is("grass"), "do", "collect a sapling from the grass")
        return None

    def _wood(self, amount: int) -> str | None:
        if self._owned["wood"] >= amount:
            return None
        return self._reach(self._is("tree"), "do", "go to the tree to collect wood") or self._search("look for trees")

    def _stone(self, amount: int) -> str | None:
        if self._owned["stone"] >= amount:
            return None
        return self._reach(self._is("stone"), "do", "collect stone") or self._search("look for stone")

    def _at_table(self, wood: int, batch: int) -> str | None:
        """Go to a table, or place one, with `wood` left; None at a table."""
        if self._owned["wood"] >= wood:
            action = self._reach(self._is("table"), "noop", "go to the table", 20)
            if action:
                return action
        return self._wood(batch) or self._place("place_table", "place a table")

    def _wood_tools(self) -> str | None:
        if self._owned["wood_pickaxe"] and self._owned["wood_sword"]:
            return None
        return self._at_table(1, 6)

    def _stone_tools(self) -> str | None:
        if self._owned["stone_pickaxe"] and self._owned["stone_sword"]:
            return None
        return self._wood(1) or self._stone(5) or self._at_table(1, 4)

    def _furnace(self) -> str | None:
        if self._owned["iron_pickaxe"] and self._owned["iron_sword"]:
            return None
        if not self._is("furnace").any():
            return (
                self._stone(4)
                or self._stand(self._beside("table"), "go to the table", 20)
                or (self._place("place_furnace", "place a furnace", self._beside("table")))
            )
        return None

    def _beside(self, name: str) -> np.ndarray:
        """Cells from which one can craft with a `name`."""
        cells = np.zeros_like(self._free)
        for cell in np.flatnonzero(self._map == _CODE[name]):
            for column in (-_WIDTH, 0, _WIDTH):
                cells[cell + column - 1 : cell + column + 2] = True
        return cells & (self._cost > 0)

    def _place_a_stone(self) -> str | None:
        if self._placed_stone or not self._owned["stone"]:
            return None
        return self._place("place_stone", "place a stone")

    def _iron_tools(self) -> str | None:
        missing = 2 - bool(self._owned["iron_pickaxe"]) - bool(self._owned["iron_sword"])
        if not missing or not self._owned["iron"] or not self._owned["coal"]:
            return None
        if self._owned["wood"] < 1:
            return self._wood(1)
        both = self._beside("table") & self._beside("furnace")
        if both.any():
            action = self._stand(both, "go to the table and the furnace", 40)
            if action:
                return action
        if not self._near("table"):
            return self._stone(4) or self._wood(3) or self._place("place_table", "place a table")
        return self._stone(4) or self._place("place_furnace", "place a furnace", self._beside("table"))

    def _ores(self) -> str | None:
        for near in (10, _FAR):
            if self._owned["iron_pickaxe"] and not self._owned["diamond"]:
                action = self._reach(self._is("diamond"), "do", "collect the diamond", near)
                if action:
                    return action
            missing = 2 - bool(self._owned["iron_pickaxe"]) - bool(self._owned["iron_sword"])
            for ore in ("iron", "coal"):
                if self._owned[ore] < missing:
                    action = self._reach(self._is(ore), "do", f"collect {ore}", near)
                    if action:
                        return action
        return None

    def _farm(self) -> str | None:
        return None

    def _search_ores(self) -> str | None:
        if self._owned["diamond"] and self._owned["iron_sword"]:
            return None
        if self._owned["stone"] < 9 and self._map[self._front] == _CODE["stone"]:
            self.plan = "collect stone"
            return "do"
        return self._search("look for ores", _MOUNTAIN)

    def _explore(self) -> str | None:
        return self._search("explore")
