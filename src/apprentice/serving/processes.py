"""How many processes hold the student at once, and where: the one place that decides it."""

import json
from pathlib import Path

from apprentice import gpus
from apprentice.workers import cores

_BYTES = {"float32": 4, "mixed": 4, "bfloat16": 2, "float16": 2}
_SPARE = 1.25
"""How much more memory than its weights a model takes on the processor: an adapter that is merged, activations."""
_PROGRAM = 0.5e9
"""Bytes that a process takes for Python, torch and its libraries."""


def places(base: Path, dtype: str, most: int) -> list[str | None]:
    """For each process that is to hold the model of this folder, its GPU, or None for the processor.

    One on each GPU; without any as many as cores and free memory allow, and one in any case. most: for how many there
    is work.
    """
    here: list[str | None] = [*gpus.names()]
    if not here:
        import psutil

        takes = weights(base) * _BYTES[dtype] * _SPARE + _PROGRAM
        here = [None] * max(1, min(cores(), int(psutil.virtual_memory().available / takes)))
    return here[: max(1, most)]


def weights(folder: Path) -> int:
    """How many numbers the safetensors files of a folder hold, by their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for entry in header.values():
            count = 1
            for size in entry["shape"]:
                count *= size
            total += count
    return total
