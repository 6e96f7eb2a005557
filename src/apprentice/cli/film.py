"""An episode as a film: GIF through Pillow, MP4 through the ffmpeg that imageio-ffmpeg brings."""

from collections.abc import Iterable, Iterator
from functools import cache
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


def write_gif(path: Path, moments: Iterable[Moment], title: str, fps: float) -> None:
    frames = (Image.fromarray(frame) for frame in _frames(moments, title))
    first = next(frames)
    with replacing(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=frames, duration=round(1000 / fps), loop=0)


def write_mp4(path: Path, moments: Iterable[Moment], title: str, fps: float) -> None:
    import imageio_ffmpeg

    with replacing(path) as partial:
        film = imageio_ffmpeg.write_frames(str(partial), (SIZE, _HEIGHT), fps=fps, macro_block_size=2)
        film.send(None)
        try:
            for frame in _frames(moments, title):
                film.send(frame.tobytes())
        finally:
            film.close()


def _frames(moments: Iterable[Moment], title: str) -> Iterator[np.ndarray]:
    """The picture with words below it: uint8 (height, width, 3)."""
    for moment in moments:
        frame = Image.new("RGB", (SIZE, _HEIGHT), "black")
        frame.paste(Image.fromarray(moment.image))
        draw = ImageDraw.Draw(frame)
        for number, line in enumerate(lines(moment, title)):
            draw.text((_MARGIN, SIZE + _MARGIN + number * _LINE), line, font=_font(), fill="white")
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
