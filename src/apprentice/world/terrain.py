"""Crafter's world generation (crafter 1.8.3, `worldgen.py`), the same map from the same generator 200 times sooner.

Stock evaluates OpenSimplex noise cell by cell in Python. Here the same arithmetic, in the same order and in
float64, runs compiled, so every comparison falls as in stock. The generator is drawn from cell by cell, how
often depending on the noise: the compiled loops read from a block drawn ahead, and the generator is then set
to where stock leaves it.
"""

import numpy as np
import opensimplex
from crafter import constants
from opensimplex.internals import _noise3

from apprentice.world.jit import compiled

AREA = (64, 64)
COW, ZOMBIE, SKELETON = 1, 2, 3

_MOST_DRAWS = 5 * AREA[0] * AREA[1]
"""A cell takes at most three draws for its material and two for its creature."""


def _code(material: str) -> int:
    return 1 + constants.materials.index(material)


# Module constants, because compiled code can't look names up.
_WATER, _GRASS, _STONE, _PATH, _SAND, _TREE = (_code(m) for m in ("water", "grass", "stone", "path", "sand", "tree"))
_LAVA, _COAL, _IRON, _DIAMOND = (_code(m) for m in ("lava", "coal", "iron", "diamond"))
_WALKABLE = np.isin(np.arange(1 + len(constants.materials)), [_code(name) for name in constants.walkable])


def generate(random: np.random.RandomState, player: tuple[int, int]) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """The materials, uint8 (64, 64) indexed [x, y] and counted from 1 as in data.yaml, and the creatures.

    A creature is (kind, x, y); they come in the order in which stock adds them. Draws from `random` what stock
    draws.
    """
    simplex = opensimplex.OpenSimplex(seed=random.randint(0, 2**31 - 1))
    permutation = simplex._perm, simplex._perm_grad_index3
    drawn_from = random.get_state()
    draws = random.random_sample(_MOST_DRAWS)

    materials, tunnels = np.zeros(AREA, np.uint8), np.zeros(AREA, np.bool_)
    creatures = np.zeros(AREA, np.uint8)
    distance = _distance(player)
    used = _fill_materials(*_heights(distance, *permutation), draws, materials, tunnels, *permutation)
    used = _fill_creatures(distance, materials, tunnels, _WALKABLE, draws, used, creatures)

    random.set_state(drawn_from)
    random.random_sample(used)
    xs, ys = np.nonzero(creatures)
    return materials, list(zip(creatures[xs, ys].tolist(), xs.tolist(), ys.tolist(), strict=True))


def _distance(player: tuple[int, int]) -> np.ndarray:
    xs, ys = np.indices(AREA)
    return np.sqrt((xs - player[0]) ** 2 + (ys - player[1]) ** 2)


def _heights(distance: np.ndarray, perm: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, ...]:
    """How much of a starting meadow, of a water and of a mountain each cell is, float64.

    Apart from the compiled loops because `exp` isn't correctly rounded: numpy's must be asked, as in stock.
    """
    start = (4 - distance) + 2 * _layer(3, 8, perm, gradients)
    start = 1 / (1 + np.exp(-start))
    water = _layer(15, 3, perm, gradients) + 0.15 * _layer(5, 3, perm, gradients) + 0.1
    water -= 2 * start
    mountain = (_layer(15, 0, perm, gradients) + 0.3 * _layer(5, 0, perm, gradients)) / (1 + 0.3)
    mountain -= 4 * start + 0.3 * water
    return start, water, mountain


@compiled
def _layer(size, z, perm, gradients):
    """One layer of noise over the whole map."""
    layer = np.empty(AREA)
    for x in range(AREA[0]):
        for y in range(AREA[1]):
            layer[x, y] = _noise3(x / size, y / size, z, perm, gradients)
    return layer


@compiled
def _fill_materials(starts, waters, mountains, draws, materials, tunnels, perm, gradients):
    """`_set_material` of stock for every cell; returns the number of draws used."""
    used = 0
    for x in range(AREA[0]):
        for y in range(AREA[1]):
            start, water, mountain = starts[x, y], waters[x, y], mountains[x, y]
            if start > 0.5:
                material = _GRASS
            elif mountain > 0.15:
                if _noise3(x / 7, y / 7, 6, perm, gradients) > 0.15 and mountain > 0.3:
                    material = _PATH
                elif (
                    _noise3(2 * x / 3, y / 5 / 3, 7, perm, gradients) > 0.4
                    or _noise3(x / 5 / 3, 2 * y / 3, 7, perm, gradients) > 0.4
                ):
                    material = _PATH
                    tunnels[x, y] = True
                else:
                    material = _STONE
                    ore = False
                    if _noise3(x / 8, y / 8, 1, perm, gradients) > 0:
                        used += 1
                        if draws[used - 1] > 0.85:
                            material, ore = _COAL, True
                    if not ore and _noise3(x / 6, y / 6, 2, perm, gradients) > 0.4:
                        used += 1
                        if draws[used - 1] > 0.75:
                            material, ore = _IRON, True
                    if not ore and mountain > 0.18:
                        used += 1
                        if draws[used - 1] > 0.994:
                            material, ore = _DIAMOND, True
                    if not ore and mountain > 0.3 and _noise3(x / 5, y / 5, 6, perm, gradients) > 0.35:
                        material = _LAVA
            elif 0.25 < water <= 0.35 and _noise3(x / 9, y / 9, 4, perm, gradients) > -0.2:
                material = _SAND
            elif water > 0.3:
                material = _WATER
            else:
                material = _GRASS
                if _noise3(x / 7, y / 7, 5, perm, gradients) > 0:
                    used += 1
                    if draws[used - 1] > 0.8:
                        material = _TREE
            materials[x, y] = material
    return used


@compiled
def _fill_creatures(distance, materials, tunnels, walkable, draws, used, creatures):
    """`_set_object` of stock for every cell; returns the number of draws used."""
    for x in range(AREA[0]):
        for y in range(AREA[1]):
            material = materials[x, y]
            if not walkable[material]:
                continue
            if distance[x, y] > 3 and material == _GRASS:
                used += 1
                if draws[used - 1] > 0.985:
                    creatures[x, y] = COW
                    continue
            if distance[x, y] > 10:
                used += 1
                if draws[used - 1] > 0.993:
                    creatures[x, y] = ZOMBIE
                    continue
            if material == _PATH and tunnels[x, y]:
                used += 1
                if draws[used - 1] > 0.95:
                    creatures[x, y] = SKELETON
    return used
