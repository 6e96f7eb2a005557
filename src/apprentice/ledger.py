"""Episodes that were played, kept per user outside of DVC: killed, rerun or extended, nothing is done twice."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apprentice.cache import cache_folder
from apprentice.errors import WorkError


def opened(path: Path) -> sqlite3.Connection:
    """A database of this name, made if it is not there; several processes may use it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return sqlite3.connect(path, timeout=60, isolation_level=None)


def write(db: sqlite3.Connection, path: Path, statement: str, values: tuple = ()) -> None:
    """Execute it whole or not at all. Raises WorkError when the disk is full or broken."""
    try:
        db.execute(statement, values)
    except sqlite3.OperationalError as error:
        raise WorkError(
            f"{path} cannot be written: {error}; what is in it is kept: make room there, or name another folder by "
            "APPRENTICE_CACHE, and run the same command again"
        ) from None


@contextmanager
def transaction(db: sqlite3.Connection, path: Path) -> Iterator[None]:
    """What is read and written within it is one act, also for other processes. After an error nothing is written."""
    write(db, path, "BEGIN IMMEDIATE")
    try:
        yield
        write(db, path, "COMMIT")
    except BaseException:
        if db.in_transaction:
            db.rollback()
        raise


class Ledger:
    """Episodes by key, for one fingerprint; several processes may use it at once.

    The key names the seed and, where it matters, the seeds that were played with it.
    """

    def __init__(self, fingerprint: str):
        self._path = cache_folder() / "episodes" / f"{fingerprint}.sqlite"
        self._db = opened(self._path)
        write(self._db, self._path, "CREATE TABLE IF NOT EXISTS episodes (key TEXT PRIMARY KEY, data BLOB NOT NULL)")

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exception) -> None:
        self._db.close()

    def keys(self) -> set[str]:
        """The episodes that have been played."""
        return {key for (key,) in self._db.execute("SELECT key FROM episodes")}

    def add(self, key: str, episode: bytes) -> None:
        """Record an episode (`store.to_bytes`); the first record of a key stays."""
        write(self._db, self._path, "INSERT OR IGNORE INTO episodes VALUES (?, ?)", (key, episode))

    def records(self, keys: Iterable[str]) -> Iterator[bytes]:
        """These episodes as they were added, in this order. Raises KeyError for one that has not been played."""
        for key in keys:
            row = self._db.execute("SELECT data FROM episodes WHERE key = ?", (key,)).fetchone()
            if row is None:
                raise KeyError(key)
            yield row[0]

    def forget(self, prefix: str) -> None:
        """Drop the episodes whose keys do not begin so; others will take their room."""
        write(self._db, self._path, "DELETE FROM episodes WHERE substr(key, 1, ?) != ?", (len(prefix), prefix))
