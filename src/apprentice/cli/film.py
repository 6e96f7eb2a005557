"""An episode as a film: GIF through Pillow, MP4 through the ffmpeg that imageio-ffmpeg brings."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apprentice.cli.screen import plain
from apprentice.cli.watch import Moment
from apprentice.files import replacing

SIZE = 288
"""Side of the picture in pixels; below it stand the words."""
_LINE, _LINES, _MARGIN = 16, 3, 4
_HEIGHT = SIZE + _LINE * _LINES + 2 * _MARGIN
_GAP = 8
"""Pixels between films side by side."""


def write_gif(path: Path, moments: Iterable[Moment], title: str, fps: float) -> None:
    _write_gif(path, (Image.fromarray(frame) for frame in _frames(moments, title)), fps)


def write_mp4(path: Path, moments: Iterable[Moment], title: str, fps: float) -> None:
    _write_mp4(path, _frames(moments, title), (SIZE, _HEIGHT), fps)


def write_side_by_side(path: Path, played: Sequence[tuple[str, Iterable[Moment]]], size: int, fps: float) -> None:
    """Several episodes at once, each with its title; one that is over waits for the others on its last frame.

    size: the side of each picture. The ending of path says which kind of film it is. The frames of a GIF have 48
    colours in common, which makes it small: 200 steps of three players at 216 pixels are less than 2 MB.
    """
    frames = _abreast([_frames(moments, title, size) for title, moments in played])
    if path.suffix.lower() == ".mp4":
        _write_mp4(path, frames, ((size + _GAP) * len(played) - _GAP, size + _HEIGHT - SIZE), fps)
        return
    found = list(frames)
    sample = np.concatenate(found[:: max(1, len(found) // 12)])
    colours = Image.fromarray(sample).quantize(48)
    _write_gif(path, (Image.fromarray(one).quantize(palette=colours, dither=Image.Dither.NONE) for one in found), fps)


def _abreast(films: Sequence[Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """The frames of all films, with a gap between them."""
    last: list = [None] * len(films)
    for frames in zip_longest(*films):
        last = [old if frame is None else frame for old, frame in zip(last, frames, strict=True)]
        padded = [np.pad(frame, ((0, 0), (0, _GAP), (0, 0))) for frame in last]
        yield np.concatenate(padded, axis=1)[:, :-_GAP]


def _write_gif(path: Path, frames: Iterator[Image.Image], fps: float) -> None:
    first = next(frames)
    with replacing(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=frames, duration=round(1000 / fps), loop=0)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], size: tuple[int, int], fps: float) -> None:
    """size: width and height of the frames."""
    import imageio_ffmpeg

    with replacing(path) as partial:
        film = imageio_ffmpeg.write_frames(str(partial), size, fps=fps, macro_block_size=2)
        film.send(None)
        try:
            for frame in frames:
                film.send(frame.tobytes())
        finally:
            film.close()


def _frames(moments: Iterable[Moment], title: str, size: int = SIZE) -> Iterator[np.ndarray]:
    """The picture with words below it: uint8 (height, width, 3)."""
    for moment in moments:
        frame = Image.new("RGB", (size, size + _HEIGHT - SIZE), "black")
        frame.paste(Image.fromarray(moment.image))
        draw = ImageDraw.Draw(frame)
        for number, line in enumerate(lines(moment, title)):
            draw.text((_MARGIN, size + _MARGIN + number * _LINE), line, font=_font(), fill="white")
        yield np.asarray(frame)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(11)


def lines(moment: Moment, title: str) -> list[str]:
    """What stands below the picture."""
    news = f"unlocked {', '.join(moment.unlocked)}" if moment.unlocked else ""
    if moment.died:
        news = f"{news}, and died" if news else "died"
    return [
        f"{title}, reward {moment.reward:.1f}, {len(moment.achievements)} of 22",
        f"step {moment.steps}  {moment.action}",
        plain(news or moment.invalid),
    ]
