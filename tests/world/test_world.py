"""The world plays as stock crafter 1.8.3 does, and gives the same bytes in any process.

Stock, as compared with here, is changed by nothing but chunks in order of arrival and a generator of its own for
the noise of its pictures; where it's deterministic of itself, it is compared with as it is.
"""

import copy
import dataclasses
import functools
import hashlib
import os
import pickle
import subprocess
import sys

import crafter
import numpy as np
import pytest
from crafter import constants, engine, objects
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from apprentice.world import ACHIEVEMENTS, ACTIONS, ITEMS, SIZE, TILES, VIEW, VITALS, Observation, World, terrain

WALKABLE = set(constants.walkable)
MOVES = {"move_left": (-1, 0), "move_right": (1, 0), "move_up": (0, -1), "move_down": (0, 1)}


# Stock


class Ordered(dict):
    """A set that is iterated over in order of arrival."""

    def add(self, item):
        self[item] = None

    def remove(self, item):
        del self[item]


class Chunks(dict):
    def __missing__(self, key):
        return self.setdefault(key, Ordered())


class View(engine.LocalView):
    noise_seed = (0, 0)

    def _noise(self, canvas, amount, stddev):
        generator = self._world.random
        self._world.random = np.random.RandomState(self.noise_seed)
        try:
            return super()._noise(canvas, amount, stddev)
        finally:
            self._world.random = generator


class Stock(crafter.Env):
    """Ordered chunks, separate noise. It only draws pictures that are asked for: a step's is thrown away."""

    def __init__(self, seed):
        super().__init__(seed=seed, size=(SIZE, SIZE))
        self._local_view = View(self._world, self._textures, VIEW)
        self._world.reset = self._reset_ordered

    def _reset_ordered(self, seed):
        engine.World.reset(self._world, seed)
        self._world._chunks = Chunks()

    def _obs(self):
        return None

    def picture(self, size):
        self._local_view.noise_seed = (self._seed & 0xFFFFFFFF, self._step)
        return self.render(np.array((size, size)))

    def render(self, size=None):
        # Stock's own `size or self._size` fails for a size that is given.
        before = self._size
        self._size = before if size is None else size
        try:
            return super().render()
        finally:
            self._size = before


def stock_view(env):
    """The names in the player's view as stock's world tells them, cell by cell."""
    rows = []
    for y in range(VIEW[1]):
        row = []
        for x in range(VIEW[0]):
            material, creature = env._world[env._player.pos + np.array((x, y)) - np.array(VIEW) // 2]
            name = material or "void"
            if creature:
                name = "player" if isinstance(creature, objects.Player) else creature.texture
            row.append(name)
        rows.append(row)
    return rows


class Pair:
    """A world and its stock, played side by side and nudged alike, so that play gets to where the rules are."""

    def __init__(self, seed):
        self.world, self.env = World(seed), Stock(seed)
        self.seen = self.world.reset()
        self.env.reset()
        self.done = False
        self.compare()

    @property
    def game(self):
        return self.world._game

    def step(self, action):
        outcome = self.world.step(action)
        _, reward, done, info = self.env.step(ACTIONS.index(action))
        self.seen, self.done = outcome.observation, done
        assert (outcome.reward, outcome.done, outcome.died) == (reward, done, info["discount"] == 0)
        assert info["achievements"] == self.game.player.achievements
        assert self.game.unlocked == self.env._unlocked
        self.compare()

    def compare(self):
        env, game, seen = self.env, self.game, self.seen
        player = env._player
        assert np.array_equal(game.land.grid(game.land.materials), env._world._mat_map)
        assert self.creatures(game.land.creatures) == self.creatures(env._world.objects)
        assert {**seen.vitals, **seen.inventory} == player.inventory
        assert seen.position == tuple(player.pos)
        assert seen.facing == tuple(player.facing)
        assert (seen.sleeping, seen.daylight) == (player.sleeping, env._world.daylight)
        assert [[TILES[code] for code in row] for row in seen.view] == stock_view(env)

    def compare_generators(self):
        ours, theirs = self.game.land.dice.state.get_state(), self.env._world.random.get_state()
        assert np.array_equal(ours[1], theirs[1])
        assert ours[2:] == theirs[2:]

    def compare_pictures(self, size):
        assert np.array_equal(self.seen.image, self.env.picture(SIZE))
        assert np.array_equal(self.world.render(size), self.env.picture(size))

    @staticmethod
    def creatures(creatures):
        def describe(creature):
            place = (creature.x, creature.y) if hasattr(creature, "x") else tuple(creature.pos)
            counters = [getattr(creature, name, None) for name in ("cooldown", "reload", "grown")]
            return type(creature).__name__, tuple(map(int, place)), creature.health, counters

        return [describe(creature) for creature in creatures]

    def give(self, **items):
        self.env._player.inventory.update(items)
        self.game.player.inventory.update(items)

    def build(self, material, x, y):
        self.env._world[x, y] = material
        self.game.land.grid(self.game.land.materials)[x, y] = TILES.index(material)

    def carry(self, x, y):
        """Put the player somewhere else, if it's free."""
        player = self.game.player
        if self.env._player.is_free((x, y)) and self.env._world[x, y][0] != "lava":
            self.game.land.move(player, x - player.x, y - player.y)
            self.env._world.move(self.env._player, (x, y))

    def ripen(self):
        for creature in [*self.game.land.creatures, *self.env._world.objects]:
            if hasattr(creature, "grown"):
                creature.grown = max(creature.grown, 299)


def nudge(pair, random):
    """Help the player along at random: without help it dies early, and never sees a diamond.

    Returns the action that makes use of it.
    """
    if random.randint(3) == 0:
        pair.give(food=9, drink=9)
    choice = random.randint(9)
    if choice == 0:
        pair.give(energy=int(random.randint(10)))
    elif choice == 1:
        pair.give(**{name: int(random.randint(10)) for name in ITEMS})
    elif choice == 2:
        pair.ripen()
    elif choice in (3, 4):
        # The map's edges more often than a place at random would have it.
        x, y = (int(random.choice([0, 1, 62, 63, *random.randint(64, size=4)])) for _ in range(2))
        pair.carry(x, y)
    elif choice in (5, 6):
        player = pair.game.player
        for material in random.choice(["table", "furnace", "coal", "iron", "diamond", "water", "grass"], 3):
            x, y = (int(here + random.randint(-1, 2)) for here in (player.x, player.y))
            if 0 <= x < 64 and 0 <= y < 64 and (x, y) != (player.x, player.y):
                pair.build(str(material), x, y)
    elif choice == 7:
        player = pair.game.player
        for material, x in (("table", player.x - 1), ("furnace", player.x + 1)):
            pair.build(material, min(63, max(0, x)), min(63, player.y + 1))
        pair.give(**{name: int(random.randint(3)) for name in ITEMS})
        return str(random.choice([name for name in ACTIONS if name.startswith("make")]))
    else:
        kinds = [c for c in pair.game.land.creatures if type(c).__name__ in ("Cow", "Zombie", "Skeleton", "Plant")]
        goal = kinds[random.randint(len(kinds))]
        for dx, dy in MOVES.values():
            pair.carry(min(63, max(0, goal.x + dx)), min(63, max(0, goal.y + dy)))
    return "do"


def leads_to_lava(seen, action):
    dx, dy = MOVES.get(action, (0, 0))
    return TILES[seen.view[3 + dy, 4 + dx]] == "lava"


def play(seed, random, steps, pictures_every):
    """Random runs of one action, `do` more than others, in as many episodes as it takes.

    Returns what was unlocked, how long the episodes were, and how many pictures of each kind of hour were compared.
    """
    unlocked, lengths, hours = set(), [], {"day": 0, "night": 0, "asleep by day": 0, "asleep by night": 0}
    pair, action, left = Pair(seed), "noop", 0
    for step in range(steps):
        if pair.done:
            lengths.append(pair.game.steps)
            pair = Pair(seed + len(lengths))
        if step % 7 == 0:
            action, left = nudge(pair, random), 1
        if pair.game.player.health < (8 if pair.seen.sleeping else 3):
            pair.give(health=9)
        if left == 0:
            action = "do" if random.randint(3) == 0 else ACTIONS[random.randint(len(ACTIONS))]
            left = 1 + random.randint(5)
        left -= 1
        if leads_to_lava(pair.seen, action) and random.randint(20):
            left, action = 0, "place_stone"
        pair.step(action)
        unlocked |= pair.game.unlocked
        if step % pictures_every == 0:
            pair.compare_pictures(int(random.choice([63, 64, 100, 256])))
            pair.compare_generators()
            hour = "day" if pair.seen.daylight >= 0.5 else "night"
            hours[f"asleep by {hour}" if pair.seen.sleeping else hour] += 1
    return unlocked, [*lengths, pair.game.steps], hours


# Faithful


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(seed=st.integers(0, 2**63), plan=st.integers(0, 2**32 - 1))
def test_any_episode_is_that_of_stock(seed, plan):
    play(seed, np.random.RandomState(plan), steps=2000, pictures_every=20)


def test_comparing_reaches_every_rule_and_every_hour():
    unlocked, lengths, hours = play(0, np.random.RandomState(0), steps=5000, pictures_every=20)
    print(lengths, hours)
    assert unlocked == set(ACHIEVEMENTS)
    assert max(lengths) > 1000
    assert min(hours.values()) >= 5, hours


def test_a_craftsman_at_the_first_column_has_nothing_nearby():
    # Stock slices its map from -1 there. A rule like any other: who plays ours must be able to play theirs.
    pair = Pair(0)
    for x, y, made in ((0, 20, 0), (24, 0, 0), (1, 20, 1), (63, 20, 2)):
        for column in range(max(0, x - 1), min(64, x + 2)):
            for row in range(max(0, y - 1), y + 2):
                pair.build("grass", column, row)
        pair.build("table", x, y + 1)
        pair.carry(x, y)
        pair.give(wood=9)
        pair.step("make_wood_pickaxe")
        assert pair.seen.position == (x, y)
        assert pair.seen.inventory["wood_pickaxe"] == made


def test_untouched_stock_plays_the_same_until_it_rolls_its_own_dice():
    # In its tenth step, stock first picks creatures out of sets; its first noise comes with the night.
    random = np.random.RandomState(1)
    for seed in range(12):
        world, env = World(seed), crafter.Env(seed=seed, size=(SIZE, SIZE))
        assert np.array_equal(world.reset().image, env.reset())
        for action in random.choice(ACTIONS, 9):
            outcome = world.step(action)
            picture, reward, done, info = env.step(ACTIONS.index(action))
            assert np.array_equal(outcome.observation.image, picture)
            assert (outcome.reward, outcome.done) == (reward, done)
            assert {**outcome.observation.vitals, **outcome.observation.inventory} == info["inventory"]
        land = world._game.land
        assert np.array_equal(land.grid(land.materials), env._world._mat_map)
        assert Pair.creatures(land.creatures) == Pair.creatures(env._world.objects)
        assert np.array_equal(land.dice.state.get_state()[1], env._world.random.get_state()[1])


IN_PYTHON = """
import hashlib, crafter, numpy as np, opensimplex
from crafter.worldgen import _simplex
assert type(opensimplex.internals._noise3).__name__ == "function", "compiled"
simplex = opensimplex.OpenSimplex(7)
heights = np.zeros((3, 64, 64))
for x in range(64):
    for y in range(64):
        # As in worldgen.py.
        start = 4 - np.sqrt((x - 32) ** 2 + (y - 32) ** 2)
        start += 2 * _simplex(simplex, x, y, 8, 3)
        start = 1 / (1 + np.exp(-start))
        water = _simplex(simplex, x, y, 3, {15: 1, 5: 0.15}, False) + 0.1
        water -= 2 * start
        mountain = _simplex(simplex, x, y, 0, {15: 1, 5: 0.3})
        mountain -= 4 * start + 0.3 * water
        heights[:, x, y] = start, water, mountain
env = crafter.Env(seed=7)
env.reset()
print(hashlib.sha256(heights).hexdigest(), hashlib.sha256(env._world._mat_map).hexdigest())
"""


def test_worlds_are_those_of_stock_without_a_compiler():
    simplex = terrain.opensimplex.OpenSimplex(7)
    heights = np.stack(terrain._heights(terrain._distance((32, 32)), simplex._perm, simplex._perm_grad_index3))
    world = World(7)
    world.reset()
    materials = np.ascontiguousarray(world._game.land.grid(world._game.land.materials))
    ours = [hashlib.sha256(array).hexdigest() for array in (heights, materials)]
    assert in_process(IN_PYTHON, NUMBA_DISABLE_JIT="1").split() == ours


def test_many_maps_are_those_of_stock():
    for seed in range(40):
        Pair(seed).compare_generators()


# The same bytes in any process


def in_process(program, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


EPISODES = """
import hashlib, sys
import numpy as np
from apprentice.world import ACTIONS, World
habit, digest = sys.argv[1], hashlib.sha256()
random = np.random.RandomState(5)
darkest = 1.0
for seed in (3, 11, 2**40 + 3):
    world = World(seed)
    outcomes, observations, done = [], [world.reset()], False
    while not done:
        outcome = world.step(str(random.choice(ACTIONS)))
        done = outcome.done
        outcomes.append((outcome.reward, outcome.unlocked, done, outcome.died))
        observations.append(outcome.observation)
        if habit == "looks":
            outcome.observation.image
        elif habit == "stares":
            for size in (72, 256, 64):
                world.render(size)
    if habit == "looks back":
        for observation in reversed(observations):
            observation.image
    for o in observations:
        darkest = min(darkest, o.daylight)
        digest.update(o.image.tobytes() + o.view.tobytes())
        digest.update(repr((o.vitals, o.inventory, o.facing, o.position, o.sleeping, o.daylight)).encode())
    digest.update(repr(outcomes).encode())
assert darkest < 0.3, darkest
print(digest.hexdigest())
"""


def test_seed_and_actions_give_the_same_bytes_in_any_process_whoever_looks():
    habits = {"looks": "0", "looks back": "1", "stares": "2", "looks away": "random"}
    digests = {habit: in_process(EPISODES, habit, PYTHONHASHSEED=seed) for habit, seed in habits.items()}
    assert len(set(digests.values())) == 1, digests


def test_a_second_process_compiles_nothing():
    World(0).reset().image.tobytes()
    program = """
from apprentice.world import picture
from apprentice.world import terrain
from apprentice import world
world.World(0).reset().image
for function in (terrain._layer, terrain._fill_materials, terrain._fill_creatures, picture._compose):
    assert not function.stats.cache_misses and function.stats.cache_hits, function
"""
    in_process(program)


def test_where_nothing_is_writable_each_process_compiles_for_itself():
    # All that's compiled would take long; if one function is compiled and kept, so are the others.
    program = """
import pathlib
from apprentice import world
from apprentice.world import jit
from apprentice.world import picture
assert picture._grey(255, 255, 255) == 255
print(*pathlib.Path(jit._FOLDER.name).glob("*/*.nbc"))
"""
    # Permissions don't stop root. A numba left without the places where it looks is in the same position.
    kept = in_process(program, NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator", NUMBA_CACHE_DIR="").split()
    assert [os.path.basename(file).split("-")[0] for file in kept] == ["picture._grey"]
    assert not os.path.exists(kept[0])


# The contract


def playing(seed, steps):
    """Pairs of the observation before and the outcome of random actions, until death or for so many steps."""
    world, random = World(seed), np.random.RandomState(seed)
    before = world.reset()
    for _ in range(steps):
        action = str(random.choice(ACTIONS))
        outcome = world.step(action)
        yield world, before, action, outcome
        before = outcome.observation
        if outcome.done:
            break


def test_the_observation_is_the_one_after_the_step():
    walked = 0
    for seed in range(4):
        for world, before, action, outcome in playing(seed, 150):
            after = outcome.observation
            assert np.array_equal(after.image, world.render(SIZE))
            if action in MOVES and not before.sleeping:
                dx, dy = MOVES[action]
                assert after.facing == (dx, dy)
                if TILES[before.view[3 + dy, 4 + dx]] in WALKABLE:
                    walked += 1
                    assert after.position == (before.position[0] + dx, before.position[1] + dy)
    assert walked > 50


def test_an_observation_is_a_snapshot():
    world = World(8)
    first = world.reset()
    copies = [copy.copy(first), copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    picture = world.render(SIZE)
    for _ in range(30):
        world.step("move_left")
    assert not np.array_equal(world.render(SIZE), picture)
    for observation in (first, *copies):
        assert observation.image.dtype == np.uint8
        assert np.array_equal(observation.image, picture)
    assert first.image is first.image
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.image = picture
    changed = dataclasses.replace(first, image=picture + 1)
    assert isinstance(changed, Observation)
    assert np.array_equal(changed.image, picture + 1)


def test_an_observation_is_as_documented():
    observation = World(5).reset()
    assert observation.image.shape == (SIZE, SIZE, 3)
    assert (observation.view.shape, observation.view.dtype) == ((7, 9), np.uint8)
    assert TILES[observation.view[3, 4]] == "player"
    assert observation.vitals == dict.fromkeys(VITALS, 9)
    assert observation.inventory == dict.fromkeys(ITEMS, 0)
    assert (observation.position, observation.facing, observation.sleeping) == ((32, 32), (0, 1), False)
    assert World(5, size=100).reset().image.shape == (100, 100, 3)


def test_an_achievement_is_unlocked_once():
    unlocked = [name for *_, outcome in playing(0, 400) for name in outcome.unlocked]
    assert unlocked
    assert len(set(unlocked)) == len(unlocked)
    for *_, outcome in playing(0, 400):
        assert bool(outcome.unlocked) == (outcome.reward > 0.5)


def test_death_ends_the_episode():
    world = World(1)
    world.reset()
    outcome = None
    while outcome is None or not outcome.done:
        outcome = world.step("noop")
    assert outcome.died
    assert outcome.observation.vitals["health"] == 0
    assert world.done
    with pytest.raises(RuntimeError, match="reset"):
        world.step("noop")
    assert np.array_equal(world.reset().image, World(1).reset().image)
    world.step("noop")


def test_the_last_step_ends_the_episode():
    world = World(1, max_steps=3)
    with pytest.raises(RuntimeError, match="reset"):
        world.step("noop")
    world.reset()
    outcomes = [world.step("noop") for _ in range(3)]
    assert [(outcome.done, outcome.died) for outcome in outcomes] == [(False, False), (False, False), (True, False)]
    with pytest.raises(RuntimeError, match="reset"):
        world.step("noop")


def test_an_unknown_action_is_refused():
    world = World(1)
    world.reset()
    with pytest.raises(ValueError, match=r"'fly'.*noop, move_left"):
        world.step("fly")
    assert world.step("noop").observation.position == (32, 32)


# Text and picture agree


@functools.cache
def texture(name):
    """Colour and opacity of crafter's picture of something, 8 by 8 pixels, read from its file."""
    image = Image.open(constants.root / "assets" / f"{name}.png").convert("RGBA").resize((8, 8), Image.NEAREST)
    pixels = np.array(image)
    return pixels[..., :3], pixels[..., 3] == 255


def texture_name(name, facing, sleeping):
    if name != "player":
        return name
    return "player-sleep" if sleeping else "player-" + next(a[5:] for a, d in MOVES.items() if d == facing)


def daylit(pixels, daylight):
    light = engine.LocalView._light
    return light(engine.LocalView.__new__(engine.LocalView), pixels, daylight).astype(np.uint8)


def assert_agree(observation):
    for row in range(VIEW[1]):
        for column in range(VIEW[0]):
            tile = observation.image[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            name = TILES[observation.view[row, column]]
            if name == "void":
                colours, opaque = np.full((8, 8, 3), 127, np.uint8), np.ones((8, 8), bool)
            else:
                colours, opaque = texture(texture_name(name, observation.facing, observation.sleeping))
                # A material covers its tile, and of a creature enough can be seen to know it.
                assert opaque.sum() >= (64 if name in constants.materials else 6)
            if observation.daylight < 1:
                colours = daylit(colours, observation.daylight)
            assert np.array_equal(tile[opaque], colours[opaque]), (name, row, column)


def test_every_tile_of_the_picture_is_what_the_view_names():
    names, noons, frames = set(), 0, 0
    for seed in range(25):
        for world, _, _, outcome in playing(seed, 130):
            observation = outcome.observation
            # At noon the light is white, and the picture shows the very bytes of the textures.
            noon = observation.daylight == 1
            if (noon or world._game.steps % 10 == 0) and not observation.sleeping and observation.daylight >= 0.5:
                assert_agree(observation)
                names |= {TILES[code] for code in np.unique(observation.view)}
                noons, frames = noons + noon, frames + 1
    assert (noons, frames) >= (15, 200)
    assert names >= {"water", "grass", "sand", "tree", "stone", "player", "cow", "zombie"}


def test_every_name_has_its_picture():
    # A world of patches, where the episodes of the test above wouldn't come to.
    pair = Pair(2)
    steps, names = 0, set()
    for steps, x in enumerate((0, 20, 40, 63, 63)):
        for column in range(max(0, x - 4), min(64, x + 5)):
            for row in range(27, 34):
                pair.build(constants.materials[(column + 3 * row) % 12], column, row)
        pair.build("grass", x, 30)
        pair.carry(x, 30)
        pair.step(("move_up", "move_down", "noop", "move_right", "place_table")[steps])
        assert_agree(pair.seen)
        names |= {TILES[code] for code in np.unique(pair.seen.view)}
    assert names >= {"void", *constants.materials, "player"}
