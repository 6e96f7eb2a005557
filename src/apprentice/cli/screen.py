"""Pictures and untrusted words in a terminal."""

import shutil
import textwrap

import numpy as np

from apprentice.world.picture import GRID

CLEAR = "\x1b[H\x1b[J"
HOME = "\x1b[H"
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l" + CLEAR, "\x1b[?25h\x1b[?1049l"
"""To a screen of one's own without a cursor, and back."""
TO_END = "\x1b[K"


def half_blocks(image: np.ndarray) -> list[str]:
    """An image, uint8 (height, width, 3), in 24-bit colour: two pixels a character, one above the other."""
    lines, even = [], np.pad(image, ((0, image.shape[0] % 2), (0, 0), (0, 0)))
    for upper, lower in zip(even[::2].tolist(), even[1::2].tolist(), strict=True):
        line, last = [], None
        for over, under in zip(upper, lower, strict=True):
            if (over, under) != last:
                line.append("\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*over, *under))
                last = over, under
            line.append("▀")
        lines.append("".join(line) + "\x1b[0m")
    return lines


def picture_size(lines_below: int) -> int:
    """The side, in pixels, of the largest picture that the terminal has room for, of whole tiles."""
    columns, rows = shutil.get_terminal_size()
    return GRID[0] * max(2, min(columns, 2 * (rows - lines_below)) // GRID[0])


def plain(text: str, width: int | None = None) -> str:
    """Words of a model as one line that can do nothing to a terminal, cut to this width."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def folded(text: str, width: int, most: int) -> list[str]:
    """The same in so many lines of this width; the last is cut, or those that it doesn't need are empty."""
    lines = textwrap.wrap(plain(text), width)
    lines += [""] * (most - len(lines))
    return [*lines[: most - 1], plain(" ".join(lines[most - 1 :]), width)]
