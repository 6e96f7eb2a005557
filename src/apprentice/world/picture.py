"""Crafter's picture (crafter 1.8.3, `engine.py`), byte for byte, from an atlas of finished tiles.

Stock blends and tints every tile anew. Here each combination of material and creature is blended once a size,
by stock's own functions, and one compiled loop puts the tiles together and lights them: by day, by night and
asleep, with stock's arithmetic in stock's order.
"""

import functools
import threading
from dataclasses import dataclass

import numpy as np
from crafter import constants, engine
from PIL import Image

from apprentice.world.jit import compiled
from apprentice.world.observation import TILES, VIEW

GRID = (9, 9)
"""Columns and rows of tiles in the picture: the view, and below it the inventory."""

_MATERIALS = 1 + len(constants.materials)
_PLAYERS = ("player-left", "player-right", "player-up", "player-down", "player-sleep")
_SPRITES = (None, *TILES[_MATERIALS + 1 :], *_PLAYERS)
"""Names of the textures that can lie on a material. The player, TILES[_MATERIALS], has several."""
_ITEMS = tuple(constants.items)
_AMOUNTS = 10
_BLACK = _MATERIALS * len(_SPRITES)
"""Place in the atlas of an item that isn't owned: the first amount of the first item."""


@dataclass(frozen=True)
class Scene:
    """All that a picture shows, at one moment: drawn later, it gives the same picture."""

    materials: np.ndarray
    """Codes of TILES, uint8 (7, 9)."""
    creatures: np.ndarray
    """The same; 0 where there's none."""
    player: str
    """Name of the player's texture."""
    inventory: tuple[int, ...]
    """How many of each of crafter's items, in its order."""
    sleeping: bool
    daylight: float
    noise: tuple[int, int]
    """Seed of the darkness' noise: the world's seed, cut to 32 bits, and the step."""


def draw(scene: Scene, size: int) -> np.ndarray:
    """The picture, uint8 (size, size, 3). A pure function: no generator of the game has a part in it."""
    unit = size // GRID[0]
    noise = np.empty((0, 0))
    if scene.daylight < 0.5:
        noise = _noise(scene.noise, (VIEW[0] * unit, VIEW[1] * unit))
    picture = np.zeros((size, size, 3), np.uint8)
    border = (size - unit * GRID[0]) // 2
    _compose(
        picture, border, _places(scene), _atlas(unit), noise, _vignette(unit), _FADED, scene.daylight, scene.sleeping
    )
    return picture


def _places(scene: Scene) -> np.ndarray:
    """Which tile of the atlas goes where, (9, 9)."""
    places = np.full((GRID[1], GRID[0]), _BLACK)
    sprites = np.where(scene.creatures > _MATERIALS, scene.creatures - np.uint8(_MATERIALS), 0)
    sprites[VIEW[1] // 2, VIEW[0] // 2] = _SPRITES.index(scene.player)
    places[: VIEW[1]] = scene.materials + _MATERIALS * sprites.astype(np.intp)
    for index, amount in enumerate(scene.inventory):
        if amount:
            places[VIEW[1] + index // GRID[0], index % GRID[0]] = _BLACK + index * _AMOUNTS + amount
    return places


@functools.lru_cache(maxsize=8)
def _atlas(unit: int) -> np.ndarray:
    """All tiles, uint8 (tiles, unit, unit, 3): each sprite on each material, then each amount of each item."""
    textures = _textures()
    tiles = []
    for sprite in _SPRITES:
        for material in (None, *constants.materials):
            tile = np.full((unit, unit, 3), 127, np.uint8)
            if material:
                engine._draw(tile, (0, 0), textures.get(material, (unit, unit)))
            if sprite:
                engine._draw_alpha(tile, (0, 0), textures.get(sprite, (unit, unit)))
            tiles.append(tile)
    item_view = engine.ItemView(textures, (1, 1))
    tiles += [item_view({item: amount}, (unit, unit)) for item in _ITEMS for amount in range(_AMOUNTS)]
    # Stock's first axis is x.
    return np.ascontiguousarray(np.stack(tiles).transpose(0, 2, 1, 3))


@functools.cache
def _textures() -> engine.Textures:
    return engine.Textures(constants.root / "assets")


@functools.lru_cache(maxsize=8)
def _vignette(unit: int) -> np.ndarray:
    """How much the darkness takes away, [x, y]: little in the middle. `LocalView._vignette` of stock."""
    xs, ys = np.meshgrid(np.linspace(-1, 1, VIEW[0] * unit), np.linspace(-1, 1, VIEW[1] * unit))
    return np.ascontiguousarray(1 - np.exp(-0.5 * (xs**2 + ys**2) / 0.5**2).T)


class _Generator(threading.local):
    """A generator that is seeded anew for each picture; making one takes ten times as long as seeding it."""

    def __init__(self):
        self.state = np.random.RandomState(0)


_GENERATOR = _Generator()


def _noise(seed: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    _GENERATOR.state.seed(seed)
    return _GENERATOR.state.uniform(32, 127, shape)


def _fade() -> np.ndarray:
    """By grey and colour, what Pillow's `ImageEnhance.Color(...).enhance(0.4)` makes of the colour.

    A table made by Pillow, because its blending is in C floats, whose rounding may depend on the machine.
    """
    values = np.arange(256, dtype=np.uint8)
    grey, colour = np.meshgrid(values, values, indexing="ij")
    return np.array(Image.blend(Image.fromarray(grey), Image.fromarray(colour), 0.4))


_FADED = _fade()


@compiled
def _grey(red, green, blue):
    """Pillow's conversion from RGB to L."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@compiled
def _darken(colour, noise, mask):
    """Stock's `_noise`, up to the truncation that follows. A mask of 0, by day, leaves the colour as it is."""
    return int((1 - mask) * colour + mask * noise)


@compiled
def _tint(colour, tint):
    return (1 - 0.5) * colour + 0.5 * tint


@compiled
def _light(red, green, blue, mask, noise, faded, daylight, sleeping):
    """The colour of a point of the map: stock's `_light` and `_sleep`.

    Stock's images are in float64 until they're given to Pillow or put on the canvas; then they're truncated.
    """
    dark_red, dark_green, dark_blue = _darken(red, noise, mask), _darken(green, noise, mask), _darken(blue, noise, mask)
    grey = _grey(dark_red, dark_green, dark_blue)
    lit_red = daylight * red + (1 - daylight) * _tint(faded[grey, dark_red], 0)
    lit_green = daylight * green + (1 - daylight) * _tint(faded[grey, dark_green], 16)
    lit_blue = daylight * blue + (1 - daylight) * _tint(faded[grey, dark_blue], 64)
    if sleeping:
        grey = _grey(int(lit_red), int(lit_green), int(lit_blue))
        lit_red, lit_green, lit_blue = _tint(grey, 0), _tint(grey, 0), _tint(grey, 16)
    return int(lit_red), int(lit_green), int(lit_blue)


@compiled
def _compose(picture, border, places, atlas, noise, vignette, faded, daylight, sleeping):
    """Fill the picture: light the tiles of the view, copy those of the inventory.

    Without noise, a tile that occurs again looks as it did, and is copied too.
    """
    unit = atlas.shape[1]
    dark = daylight < 0.5
    amount = 2 * (0.5 - daylight)
    lit_at = np.full((atlas.shape[0], 2), -1)
    for row in range(places.shape[0]):
        for column in range(places.shape[1]):
            place = places[row, column]
            tile = atlas[place]
            top, left = border + row * unit, border + column * unit
            if row >= VIEW[1]:
                picture[top : top + unit, left : left + unit] = tile
                continue
            y, x = lit_at[place]
            if y >= 0 and not dark:
                picture[top : top + unit, left : left + unit] = picture[y : y + unit, x : x + unit]
                continue
            lit_at[place] = top, left
            for i in range(unit):
                for j in range(unit):
                    red, green, blue = tile[i, j, 0], tile[i, j, 1], tile[i, j, 2]
                    mask, grain = 0.0, 0.0
                    if dark:
                        grain = noise[column * unit + j, row * unit + i]
                        mask = amount * vignette[column * unit + j, row * unit + i]
                    lit = _light(red, green, blue, mask, grain, faded, daylight, sleeping)
                    picture[top + i, left + j, 0] = lit[0]
                    picture[top + i, left + j, 1] = lit[1]
                    picture[top + i, left + j, 2] = lit[2]
