"""Episodes as fine-tuning data: who is held out, JSONL that needs no memory, and the order of training."""

import json
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from apprentice.files import replacing


def held_out(achievements: dict[int, float], fraction: float, random_seed: int) -> set[int]:
    """The seeds to validate on: this fraction of them, drawn evenly from good and bad ones; at least one, but for 0.

    achievements: mean number of achievements for each world seed. All episodes on a seed are on one side, because
    their frames are nearly the same. Raises ValueError with fewer than two seeds.
    """
    if not fraction:
        return set()
    if len(achievements) < 2:
        raise ValueError(f"{len(achievements)} seed(s) cannot be split: collect or keep at least two")
    generator = np.random.default_rng([random_seed, 5])
    ranked = sorted(achievements, key=lambda seed: (achievements[seed], seed))
    count = min(max(1, round(fraction * len(ranked))), len(ranked) - 1)
    # One from each of `count` strata of equal size.
    bounds = np.linspace(0, len(ranked), count + 1).round().astype(int)
    return {ranked[generator.integers(low, high)] for low, high in zip(bounds[:-1], bounds[1:], strict=True)}


def write_jsonl(path: Path, rows: Iterable[dict], shuffle: int | None = None) -> int:
    """Write rows as lines, shuffled with this seed if one is given; only the lines' places are kept in memory.

    Returns how many.
    """
    places = [0]
    with replacing(path) as plain:
        with plain.open("wb") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
                places.append(file.tell())
        if shuffle is not None:
            order = np.random.default_rng([shuffle, 6]).permutation(len(places) - 1)
            with plain.open("rb") as source, replacing(plain) as shuffled, shuffled.open("wb") as file:
                for index in order:
                    source.seek(places[index])
                    file.write(source.read(places[index + 1] - places[index]))
    return len(places) - 1


class Jsonl:
    """Rows of a JSONL file, read when asked for: in memory are eight bytes for each."""

    def __init__(self, path: Path, places: np.ndarray | None = None):
        """places: int64 (rows,), the byte at which each line begins; found in the file if not known."""
        self.path, self._places = path, places
        if places is None:
            found, place = array("q"), 0
            with path.open("rb") as file:
                for line in file:
                    found.append(place)
                    place += len(line)
            self._places = np.array(found)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek(self._places[index])
            return json.loads(file.readline())


_LIKE = 0.05
_WINDOW = 32


def order(lengths: np.ndarray, batch_size: int, epochs: float, random_seed: int) -> np.ndarray:
    """Which row comes when in training: places in `lengths`, in whole batches of rows of like length.

    Rows are shuffled for each epoch. Then, of every 32 batches, those whose lengths are about 5 % apart go together,
    and the batches are shuffled again: so little is padded, and rows of nearly one length stay mixed. The order depends
    on these arguments alone, not on how many devices share a batch. The last batch is filled with the first rows of one
    more epoch.

    lengths: tokens of each row (rows,).
    """
    generator, rows = np.random.default_rng([random_seed, 8]), np.arange(len(lengths), dtype=np.int32)
    needed = -(-round(epochs * len(rows)) // batch_size) * batch_size
    shuffled = np.empty(needed, np.int32)
    for first in range(0, needed, len(rows)):
        shuffled[first : first + len(rows)] = generator.permutation(rows)[: needed - first]
    like = (np.log(lengths, dtype=np.float32) / _LIKE).astype(np.int16)
    for first in range(0, needed, _WINDOW * batch_size):
        window = shuffled[first : first + _WINDOW * batch_size]
        together = window[np.argsort(like[window], kind="stable")].reshape(-1, batch_size)
        window[:] = generator.permutation(together).reshape(-1)
    return shuffled
