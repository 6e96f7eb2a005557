"""Episodes and paid replies, kept per user outside of DVC: killed, rerun or extended, nothing is done twice."""

import fcntl
import hashlib
import json
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from platformdirs import user_cache_path

from apprentice import store, world
from apprentice.command import WorkError
from apprentice.episode import Reply


def cache() -> Path:
    """The folder for what survives a run: $APPRENTICE_CACHE, or the user's cache folder."""
    return Path(os.environ.get("APPRENTICE_CACHE") or user_cache_path("apprentice"))


def fingerprint(**settings) -> str:
    """A name for everything that changes an episode, apart from its seed: settings as JSON-able values.

    The versions of the world and of the rows belong to it.
    """
    return _hash({"world": world.VERSION, "store": store.VERSION, **settings})


PLACES = frozenset({"compute", "launch", "node"})
"""Modules that decide where a stage runs and never what comes out. They are in no fingerprint and no dep of dvc.yaml:
an edit of one reruns nothing."""


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def shown_digest(messages: list[dict], tools: list[dict]) -> str:
    """A name for all that a model was shown, by which `Replies` knows what it said."""
    return hashlib.sha256(json.dumps([messages, tools]).encode()).hexdigest()


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
    library = [file for file in Path(__file__).parent.glob("*.py") if file.stem not in PLACES]
    return " ".join(digest(file) for file in [*sorted(library), Path(stage)])


def _opened(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    return sqlite3.connect(path, timeout=60, isolation_level=None)


def _write(db: sqlite3.Connection, path: Path, statement: str, values: tuple = ()) -> None:
    """Execute it whole or not at all. Raises WorkError when the disk is full or broken."""
    try:
        db.execute(statement, values)
    except sqlite3.OperationalError as error:
        raise WorkError(
            f"{path} cannot be written: {error}; what is in it is kept: make room there, or name another folder by "
            "APPRENTICE_CACHE, and run the same command again"
        ) from None


class Ledger:
    """Episodes by key, for one fingerprint; several processes may use it at once.

    The key names the seed and, where it matters, the seeds that were played with it.
    """

    def __init__(self, fingerprint: str):
        self._path = cache() / "episodes" / f"{fingerprint}.sqlite"
        self._db = _opened(self._path)
        _write(self._db, self._path, "CREATE TABLE IF NOT EXISTS episodes (key TEXT PRIMARY KEY, data BLOB NOT NULL)")

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exception) -> None:
        self._db.close()

    def keys(self) -> set[str]:
        """The episodes that have been played."""
        return {key for (key,) in self._db.execute("SELECT key FROM episodes")}

    def add(self, key: str, episode: bytes) -> None:
        """Record an episode (`store.to_bytes`); the first record of a key stays."""
        _write(self._db, self._path, "INSERT OR IGNORE INTO episodes VALUES (?, ?)", (key, episode))

    def records(self, keys: Iterable[str]) -> Iterator[bytes]:
        """These episodes as they were added, in this order. Raises KeyError for one that has not been played."""
        for key in keys:
            row = self._db.execute("SELECT data FROM episodes WHERE key = ?", (key,)).fetchone()
            if row is None:
                raise KeyError(key)
            yield row[0]

    def forget(self, prefix: str) -> None:
        """Drop the episodes whose keys do not begin so; others will take their room."""
        _write(self._db, self._path, "DELETE FROM episodes WHERE substr(key, 1, ?) != ?", (len(prefix), prefix))


class Replies:
    """What an endpoint has answered to one agent: each reply as it came, with what it cost and how long it took.

    A reply is known by the episode's seed, its place there, and a digest of all that was shown for it. Beside them
    stands how episodes ended, by the run, which is a name for all that shapes an episode.

    settings: what shapes a reply beside what is shown, JSON-able. alone: wait until no other process has opened them
    so, since two would pay for the same replies.
    """

    def __init__(self, agent: str, settings: dict, alone: bool = False):
        self._path = cache() / "replies" / f"{agent}-{_hash(settings)}.sqlite"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._path.with_suffix(".lock").open("w")
        if alone:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{agent}: waiting for another process that plays it", file=sys.stderr, flush=True)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._db = _opened(self._path)
        for statement in (
            # Safe from a killed process, if not from a power cut; without a sync to disk, a record takes 0.2 ms.
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = NORMAL",
            "CREATE TABLE IF NOT EXISTS replies (seed INTEGER, decision INTEGER, shown TEXT, message TEXT, "
            "finish_reason TEXT, model TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cost REAL, "
            "seconds REAL, PRIMARY KEY (seed, decision, shown))",
            "CREATE TABLE IF NOT EXISTS episodes (run TEXT, seed INTEGER, cost REAL, failure TEXT, code TEXT, "
            "data BLOB, PRIMARY KEY (run, seed))",
        ):
            _write(self._db, self._path, statement)

    def __enter__(self) -> "Replies":
        return self

    def __exit__(self, *exception) -> None:
        self._db.close()
        self._lock.close()

    def get(self, seed: int, decision: int, shown: str) -> tuple[Reply, float | None] | None:
        """The reply and its dollars, None where the price was not known; None if there's no such reply."""
        row = self._db.execute(
            "SELECT message, finish_reason, model, prompt_tokens, completion_tokens, cost FROM replies "
            "WHERE seed = ? AND decision = ? AND shown = ?",
            (seed, decision, shown),
        ).fetchone()
        return row and (Reply(json.loads(row[0]), *row[1:5]), row[5])

    def add(self, seed: int, decision: int, shown: str, reply: Reply, cost: float | None, seconds: float) -> None:
        row = (seed, decision, shown, json.dumps(reply.message), reply.finish_reason, reply.model)
        row += (reply.prompt_tokens, reply.completion_tokens, cost, seconds)
        _write(self._db, self._path, "INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def ended(self, run: str, seed: int, cost: float | None, code: str, episode: bytes) -> None:
        """Record a finished episode (`store.to_bytes`), what its replies cost, and the code that made it of them."""
        row = (run, seed, cost, None, code, episode)
        _write(self._db, self._path, "INSERT OR REPLACE INTO episodes VALUES (?, ?, ?, ?, ?, ?)", row)

    def failed(self, run: str, seed: int, reason: str) -> None:
        """Record that an episode came to no end."""
        row = (run, seed, None, reason, None, None)
        _write(self._db, self._path, "INSERT OR REPLACE INTO episodes VALUES (?, ?, ?, ?, ?, ?)", row)

    def records(self, run: str, seeds: Iterable[int]) -> Iterator[bytes]:
        """These finished episodes as they were added, in this order."""
        for seed in seeds:
            query = "SELECT data FROM episodes WHERE run = ? AND seed = ?"
            yield self._db.execute(query, (run, seed)).fetchone()[0]

    def finished(self, run: str, code: str | None = None) -> dict[int, float | None]:
        """The dollars of each finished episode, by its seed; code: only of those that it has made."""
        query = "SELECT seed, cost FROM episodes WHERE run = ? AND failure IS NULL AND code = coalesce(?, code)"
        return dict(self._db.execute(query, (run, code)))

    def failures(self, run: str) -> dict[int, str]:
        """Why episodes failed, by seed."""
        return dict(self._db.execute("SELECT seed, failure FROM episodes WHERE run = ? AND failure NOT NULL", (run,)))

    def decisions(self) -> dict[int, int]:
        """How many decisions have been answered, by seed."""
        return dict(self._db.execute("SELECT seed, count(DISTINCT decision) FROM replies GROUP BY seed"))

    def spent(self) -> float | None:
        """Dollars for all replies; None if a price was not known."""
        unknown, total = self._db.execute("SELECT count(*) - count(cost), sum(cost) FROM replies").fetchone()
        return None if unknown else total or 0.0
