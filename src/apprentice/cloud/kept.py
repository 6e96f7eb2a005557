"""What a stage has in its cache on a machine that may go away, as one file: checkpoints, episodes, paid replies.

A bucket takes files whole, but in no order, and SQLite cannot work on one: so the stage works on the machine's own
disk, and what it has there is packed into a file whenever a checkpoint is whole.
"""

import shutil
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from io import BytesIO
from pathlib import Path

from apprentice.files import SEAL, remove, replacing

_END = "whole"
"""The last member of a file that is whole; one that a kill cut short lacks it."""
_PASSING = ("serve", "launch")
"""Folders of the cache that are worth nothing later."""
_UNSAID = (".sqlite-wal", ".sqlite-shm", ".sqlite-journal", ".lock")


def pack(cache: Path, folder: Path, checkpoints: bool = True, most: int = 2) -> None:
    """Write a file <number>.tar with what is in the cache, beside earlier ones, of which `most` stay with it.

    checkpoints: False leaves them out, and takes only the databases. Raises OSError if the stage removes something
    meanwhile; trying again is then enough.
    """
    number = max((int(path.stem) for path in _files(folder)), default=0) + 1
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".partial-") as scratch:
        packed = Path(scratch) / "tar"
        with tarfile.open(packed, "w") as tar:
            for path in _worth(cache):
                name = str(path.relative_to(cache))
                if path.suffix == ".sqlite":
                    copy = Path(scratch) / "sqlite"
                    remove(copy)
                    with closing(sqlite3.connect(path)) as here, closing(sqlite3.connect(copy)) as there:
                        here.backup(there)
                    tar.add(copy, name)
                elif checkpoints:
                    tar.add(path, name)
            tar.addfile(tarfile.TarInfo(_END), BytesIO())
        # Not renamed into place: on a bucket that would send it twice.
        shutil.copyfile(packed, folder / f"{number}.tar")
    for path in _files(folder)[:-most]:
        remove(path)


def unpack(folder: Path, cache: Path) -> bool:
    """Put what the newest whole file of a folder has into the cache. Returns whether there was one.

    Checkpoints of the same run are replaced; episodes and replies that the cache has stay, and others are added.
    """
    for path in reversed(_files(folder)):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as name:
            scratch = Path(name)
            try:
                with tarfile.open(path) as tar:
                    # Python has filters since 3.11.4; what is unpacked here was packed by us.
                    tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
                    tar.extractall(scratch)
            except (tarfile.TarError, EOFError):
                continue
            if not (scratch / _END).exists():
                continue
            for found in sorted(scratch.glob("*/*")):
                target = cache / found.relative_to(scratch)
                if target.suffix == ".sqlite" and target.exists():
                    _add(found, target)
                else:
                    with replacing(target) as unfinished:
                        found.rename(unfinished)
            return True
    return False


def newest(cache: Path) -> frozenset[Path]:
    """The checkpoints that are whole: what makes it worth to pack again."""
    return frozenset(cache.glob(f"*/*/checkpoint-*/{SEAL}"))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"), key=lambda path: int(path.stem))


def _worth(cache: Path) -> list[Path]:
    """Files that are finished. Of checkpoints those that were whole before: all that these refer to is there, too."""
    whole = {mark.parent for mark in newest(cache)}
    found = []
    for path in sorted(cache.rglob("*")):
        parts = path.relative_to(cache).parts
        run = cache.joinpath(*parts[:3])
        unfinished = len(parts) > 2 and parts[2].startswith("checkpoint-") and run not in whole
        passing = parts[0] in _PASSING or any(part.startswith(".partial-") for part in parts)
        if path.is_file() and not (unfinished or passing or path.name.endswith(_UNSAID)):
            found.append(path)
    return found


def _add(source: Path, target: Path) -> None:
    """Add a database's rows to another's; a row that is there stays."""
    with closing(sqlite3.connect(target, timeout=60, isolation_level=None)) as db:
        db.execute("ATTACH ? AS other", (str(source),))
        tables = db.execute("SELECT name, sql FROM other.sqlite_master WHERE type = 'table'").fetchall()
        db.execute("BEGIN IMMEDIATE")
        for name, made in tables:
            if not db.execute("SELECT 1 FROM main.sqlite_master WHERE name = ?", (name,)).fetchone():
                db.execute(made)
            db.execute(f'INSERT OR IGNORE INTO main."{name}" SELECT * FROM other."{name}"')
        db.execute("COMMIT")
