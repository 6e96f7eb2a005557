"""Files that are there whole or not at all, their digests and seals, and locks that processes wait for."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that takes the place of `path` when the `with` ends well.

    What is given is a path beside it that does not exist yet. After an error, or a kill, `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".partial-{path.name}")  # with its ending: programs go by it
    remove(unfinished)
    try:
        yield unfinished
    except BaseException:
        remove(unfinished)
        raise
    if path.is_dir():
        shutil.rmtree(path)
    unfinished.replace(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def digest(path: Path, without: str = "") -> str:
    """The SHA-256 of a file, or of all files of a folder with their names, but for those named `without`: a model's
    card, README.md, shapes nothing that the model does.
    """
    hashed = hashlib.sha256()
    inside = path.rglob("*") if path.is_dir() else [path]
    files = sorted(file for file in inside if file.is_file() and file.name != without)
    for file in files:
        hashed.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as data:
            while chunk := data.read(1 << 20):
                hashed.update(chunk)
    return hashed.hexdigest()


SEAL = "whole.json"
"""The file that marks a folder as whole: path from the folder → digest."""


def seal(folder: Path, beside: Iterable[Path] = ()) -> None:
    """Mark a folder as whole, with the digests of its files and of files beside it that it needs; all are on the disk
    then, as no power cut can change any more."""
    files = sorted({*_files(folder), *beside})
    for file in files:
        _sync(file)
    with replacing(folder / SEAL) as path:
        path.write_text(json.dumps({os.path.relpath(file, folder): digest(file) for file in files}, indent=1))
        _sync(path)
    for changed in sorted({folder, folder.parent, *(file.parent for file in files)}):
        _sync(changed)


def sealed(folder: Path) -> set[Path]:
    """The files that a sealed folder needs, its own and those beside it."""
    return {(folder / name).resolve() for name in json.loads((folder / SEAL).read_text())}


def damage(folder: Path, only: str = "") -> str:
    """The first file of a folder that is not as it was sealed, and why; empty where all are.

    only: the name of the one file to look at, where the others are not read.
    """
    try:
        digests = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        return f"{folder} was not finished"
    except ValueError:
        return f"{folder / SEAL} is damaged"
    for name, known in ({only: digests[only]} if only else digests).items():
        file = Path(os.path.normpath(folder / name))
        if not file.is_file():
            return f"{file} is gone"
        if digest(file) != known:
            return f"{file} is {'damaged' if file.stat().st_size else 'empty'}"
    return ""


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file != folder / SEAL]


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, waiting: str, inherited: bool = False) -> Iterator[None]:
    """Hold the lock of this name; while another process has it, say `waiting` once and wait.

    inherited: programs that this process starts keep the lock until they end, even after this process is killed. The
    package filelock keeps its descriptor to itself, so it cannot do that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        os.set_inheritable(file.fileno(), inherited)
        yield
