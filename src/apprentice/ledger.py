"""Finished episodes, kept per user outside of DVC: killed, rerun or extended, nothing is played twice."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from platformdirs import user_cache_path

from apprentice import store, world
from apprentice.episode import Episode


def cache() -> Path:
    """The folder for what survives a run: $APPRENTICE_CACHE, or the user's cache folder."""
    return Path(os.environ.get("APPRENTICE_CACHE") or user_cache_path("apprentice"))


def fingerprint(**settings) -> str:
    """A name for everything that changes an episode, apart from its seed: settings as JSON-able values.

    The versions of the world and of the rows belong to it.
    """
    everything = {"world": world.VERSION, "store": store.VERSION, **settings}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


def digest(path: Path) -> str:
    """The SHA-256 of a file, or of all files of a folder with their names."""
    hashed = hashlib.sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        hashed.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as data:
            while chunk := data.read(1 << 20):
                hashed.update(chunk)
    return hashed.hexdigest()


def code(stage: str) -> str:
    """The digest of the library's source and of a stage's file (its `__file__`).

    Part of the fingerprint of whatever is free to do again: after an edit nothing old is taken for new.
    """
    library = Path(__file__).parent
    return " ".join(digest(file) for file in [*sorted(library.glob("*.py")), Path(stage)])


class Ledger:
    """Episodes by key, for one fingerprint; several processes may use it at once.

    The key names the seed and, where it matters, the seeds that were played with it.
    """

    def __init__(self, fingerprint: str):
        folder = cache() / "episodes"
        folder.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(folder / f"{fingerprint}.sqlite", timeout=60, isolation_level=None)
        self._db.execute("CREATE TABLE IF NOT EXISTS episodes (key TEXT PRIMARY KEY, data BLOB NOT NULL)")

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exception) -> None:
        self._db.close()

    def keys(self) -> set[str]:
        """The episodes that have been played."""
        return {key for (key,) in self._db.execute("SELECT key FROM episodes")}

    def add(self, key: str, episode: bytes) -> None:
        """Record an episode (`store.to_bytes`); the first record of a key stays."""
        self._db.execute("INSERT OR IGNORE INTO episodes VALUES (?, ?)", (key, episode))

    def episodes(self, keys: Iterable[str]) -> Iterator[Episode]:
        """These episodes, in this order. Raises KeyError for one that has not been played."""
        for key in keys:
            row = self._db.execute("SELECT data FROM episodes WHERE key = ?", (key,)).fetchone()
            if row is None:
                raise KeyError(key)
            yield store.from_bytes(row[0])
