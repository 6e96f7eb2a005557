"""Chat rows as training examples: surveyed once, encoded when asked for."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset

from apprentice import progress
from apprentice.cache import cache_folder
from apprentice.data.dataset import Jsonl
from apprentice.errors import WorkError
from apprentice.files import replacing
from apprentice.params import Profile
from apprentice.student import loading
from apprentice.student.encoding import batch, encode, encode_all, lengths
from apprentice.workers import in_processes

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor


@dataclass(frozen=True)
class Survey:
    """What is known of a file's rows without encoding them."""

    places: np.ndarray
    """int64 (rows,): the byte at which each begins."""
    lengths: np.ndarray
    """int32 (rows,): tokens."""
    answers: np.ndarray
    """int32 (rows,): tokens of the answer."""
    teachers: list[dict]
    """Who taught them: teacher, model, rows and episodes of each."""

    def fitting(self, profile: Profile) -> np.ndarray:
        """bool (rows,): which are trained on: not too long, and with an answer that the student's own play would not
        cut off."""
        return (self.lengths <= profile.sft.max_length) & (self.answers <= profile.sampling.max_tokens)


def survey(path: Path, base: Path, name: str) -> Survey:
    """Go through a file's rows once, on all cores; the result is kept in the user's cache.

    base: the folder of the student's base model. name: names all that the result depends on. Raises WorkError that
    names a row which cannot be encoded.
    """
    folder = cache_folder() / "rows"
    rows, teachers = folder / f"{name}.npy", folder / f"{name}.json"
    if not rows.exists():
        size = path.stat().st_size
        calls = [(path, base, first, min(first + _PART, size)) for first in range(0, size, _PART)]
        # To start processes takes longer than to go through a small file.
        found = in_processes(_survey_part, calls) if size > _ALONE else (_survey_part(*call) for call in calls)
        parts = list(progress.counted(found, path.name, len(calls), "part"))
        parts.sort(key=lambda part: part[0])
        counts: Counter[tuple] = Counter()
        episodes: defaultdict[tuple, set[str]] = defaultdict(set)
        for _, _, counted, seen in parts:
            counts += counted
            for key, ids in seen.items():
                episodes[key] |= ids
        known = [
            {"teacher": teacher, "model": model, "rows": counts[teacher, model], "episodes": len(ids)}
            for (teacher, model), ids in sorted(episodes.items(), key=str)
        ]
        with replacing(teachers) as unfinished:
            unfinished.write_text(json.dumps(known))
        with replacing(rows) as unfinished, unfinished.open("wb") as file:
            np.save(file, np.concatenate([part[1] for part in parts]) if parts else np.empty(0, _ROW))
    table = np.load(rows, mmap_mode="r")
    return Survey(table["place"], table["tokens"], table["answer"], json.loads(teachers.read_text()))


_PART = 16 << 20
_ALONE = 256 << 20
_ROW = np.dtype([("place", np.int64), ("tokens", np.int32), ("answer", np.int32)])


def _survey_part(path: Path, base: Path, first: int, last: int) -> tuple[int, np.ndarray, Counter, dict]:
    """Of the lines that begin in bytes first to last: first, the rows, their number and episodes by teacher."""
    processor, rows, counts, episodes = _processor(base), [], Counter(), defaultdict(set)
    with path.open("rb") as file:
        file.seek(max(0, first - 1))
        place = first + len(file.readline()) - 1 if first else 0
        while place < last:
            line = file.readline()
            with _of_row(path, place):
                row = json.loads(line)
                rows.append((place, *lengths(processor, row["messages"])))
                teacher = row["metadata"]["teacher"], row["metadata"]["model"]
                counts[teacher] += 1
                episodes[teacher].add(row["metadata"]["episode_id"])
            place += len(line)
    return first, np.array(rows, _ROW), counts, episodes


_processor = lru_cache(loading.processor)


@contextmanager
def _of_row(path: Path, place: int) -> Iterator[None]:
    """Raise any error as a WorkError that names the row at this byte.

    A StopIteration too: a trainer that asks for the next row would take it for the end of the data.
    """
    try:
        yield
    except Exception as error:
        with path.open("rb") as file:
            number = 1
            while file.tell() < place and file.readline():
                number += 1
        raise WorkError(
            f"{path}, line {number}, cannot be encoded ({type(error).__name__}: {error}); "
            "make it anew: dvc repro -f -s split"
        ) from error


class Rows:
    """Chat rows of a JSONL file, encoded when asked for."""

    def __init__(self, path: Path, processor: "Qwen3VLProcessor", places: np.ndarray, chosen: np.ndarray):
        """places: where each row begins. chosen: which rows, in the order in which they are to be given."""
        self.processor, self._rows, self._path, self._places = processor, Jsonl(path, places), path, places
        self.dataset = Dataset.from_dict({"row": chosen}).with_transform(self._encode)
        """What TRL takes; a row is encoded when it is asked for."""

    def _encode(self, chosen: dict) -> dict:
        try:
            encoded = encode_all(self.processor, [self._rows[index]["messages"] for index in chosen["row"]])
        except Exception as error:
            for index in chosen["row"]:
                with _of_row(self._path, self._places[index]):
                    encode(self.processor, self._rows[index]["messages"])
            raise WorkError(f"{self._path}: rows cannot be encoded together: {error!r}") from error
        # TRL takes the data set for one with pictures if a row has the key `images`.
        return {"images": [row.image_grid_thw for row in encoded], "encoded": encoded}

    def collate(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Model inputs and labels. TRL's own collator for VLMs would leave the tools out of the prompt."""
        return batch(self.processor, [row["encoded"] for row in rows])
