"""Episodes as fine-tuning data: who is held out, and JSONL in an order that needs no memory."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np


def held_out(achievements: dict[int, float], fraction: float, random_seed: int) -> set[int]:
    """The seeds to validate on: this fraction of them, at least one, drawn evenly from good and bad ones.

    achievements: mean number of achievements for each world seed. All episodes on a seed are on one side, because
    their frames are nearly the same. Raises ValueError with fewer than two seeds.
    """
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
    path.parent.mkdir(parents=True, exist_ok=True)
    plain, places = path.with_name(path.name + ".partial"), [0]
    with plain.open("wb") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
            places.append(file.tell())
    if shuffle is not None:
        shuffled = path.with_name(path.name + ".shuffled")
        with plain.open("rb") as source, shuffled.open("wb") as file:
            for index in np.random.default_rng([shuffle, 6]).permutation(len(places) - 1):
                source.seek(places[index])
                file.write(source.read(places[index + 1] - places[index]))
        plain.unlink()
        plain = shuffled
    plain.replace(path)
    return len(places) - 1


class Jsonl:
    """Rows of a JSONL file, read when asked for: a sequence whose memory does not grow with the rows' size."""

    def __init__(self, path: Path):
        self.path = path
        self._places = [0]
        with path.open("rb") as file:
            for line in file:
                self._places.append(self._places[-1] + len(line))

    def __len__(self) -> int:
        return len(self._places) - 1

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek(self._places[index])
            return json.loads(file.readline())

    def __iter__(self) -> Iterator[dict]:
        with self.path.open("rb") as file:
            yield from map(json.loads, file)
