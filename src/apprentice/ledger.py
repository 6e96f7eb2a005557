"""Episodes that were played, kept per user outside of DVC: killed, rerun or extended, nothing is done twice."""

import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apprentice.cache import cache_folder
from apprentice.errors import WorkError


def opened(path: Path, begin_anew: bool = False) -> sqlite3.Connection:
    """A database of this name, made if it is not there; several processes may use it at once.

    A damaged one is moved aside. Then WorkError is raised, or a new one begun, with a message.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.stat().st_size:
        why = "a kill came before anything was in it, or a power cut has emptied it"
        print(f"{path} is empty, and begun anew: {why}", file=sys.stderr, flush=True)
    db = sqlite3.connect(path, timeout=60, isolation_level=None)
    if _sound(db):
        return db
    db.close()
    aside = next(name for number in range(1, 1000) if not (name := Path(f"{path}.damaged-{number}")).exists())
    for part in ("", "-wal", "-journal", "-shm"):
        if Path(f"{path}{part}").exists():
            Path(f"{path}{part}").rename(f"{aside}{part}")
    message = f"{path} was damaged, and is now {aside}; `sqlite3 {aside} .recover` prints what can be read of it"
    if not begin_anew:
        raise WorkError(f"{message}. Run the same command again to begin anew: what was paid for is paid for again")
    print(f"{message}. What it lacks is played again", file=sys.stderr, flush=True)
    return opened(path)


def _sound(db: sqlite3.Connection) -> bool:
    try:
        return db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.OperationalError:
        raise  # it's locked, or the disk is broken
    except sqlite3.DatabaseError:
        return False


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
        self._db = opened(self._path, begin_anew=True)
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
