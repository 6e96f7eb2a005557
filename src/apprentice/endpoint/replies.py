"""What an endpoint has answered, kept for ever: every reply was paid for."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from apprentice.endpoint.purse import database, path
from apprentice.episode import Reply
from apprentice.files import locked
from apprentice.ledger import write


def shown_digest(messages: list[dict], tools: list[dict]) -> str:
    """A name for all that a model was shown, by which `Replies` knows what it said."""
    return hashlib.sha256(json.dumps([messages, tools]).encode()).hexdigest()


class Replies:
    """What an endpoint has answered to one agent: each reply as it came, with what it cost and how long it took.

    A reply is known by the episode's seed, its place there, and a digest of all that was shown for it. Beside them
    stands how episodes ended, by the run, which is a name for all that shapes an episode. What was paid is in the same
    database, see `Purse`: a payment may come to no reply.

    settings: what shapes a reply beside what is shown, JSON-able. alone: wait until no other process has opened this
    agent's so, since two would pay for the same replies.
    """

    def __init__(self, agent: str, settings: dict, alone: bool = False):
        self.agent, self._path = agent, path(settings)
        self._held = ExitStack()
        if alone:
            waiting = f"{agent}: waiting for another process that plays it"
            self._held.enter_context(locked(self._path.with_name(f"{self._path.stem}-{agent}.lock"), waiting))
        tables = (
            "CREATE TABLE IF NOT EXISTS replies (agent TEXT, seed INTEGER, decision INTEGER, shown TEXT, message TEXT, "
            "finish_reason TEXT, model TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cost REAL, "
            "seconds REAL, PRIMARY KEY (agent, seed, decision, shown))",
            "CREATE TABLE IF NOT EXISTS episodes (run TEXT, seed INTEGER, cost REAL, failure TEXT, code TEXT, "
            "data BLOB, PRIMARY KEY (run, seed))",
        )
        self._db = database(self._path, tables)

    def __enter__(self) -> "Replies":
        return self

    def __exit__(self, *exception) -> None:
        self._db.close()
        self._held.close()

    def get(self, seed: int, decision: int, shown: str) -> tuple[Reply, float | None] | None:
        """The reply and its dollars, None where the price was not known; None if there's no such reply."""
        row = self._db.execute(
            "SELECT message, finish_reason, model, prompt_tokens, completion_tokens, cost FROM replies "
            "WHERE agent = ? AND seed = ? AND decision = ? AND shown = ?",
            (self.agent, seed, decision, shown),
        ).fetchone()
        return row and (Reply(json.loads(row[0]), *row[1:5]), row[5])

    def add(self, seed: int, decision: int, shown: str, reply: Reply, cost: float | None, seconds: float) -> None:
        said = (json.dumps(reply.message), reply.finish_reason, reply.model)
        row = (self.agent, seed, decision, shown, *said, reply.prompt_tokens, reply.completion_tokens, cost, seconds)
        write(self._db, self._path, "INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def ended(self, run: str, seed: int, cost: float | None, code: str, episode: bytes) -> None:
        """Record a finished episode (`store.to_bytes`), what its replies cost, and the code that made it of them."""
        row = (run, seed, cost, None, code, episode)
        write(self._db, self._path, "INSERT OR REPLACE INTO episodes VALUES (?, ?, ?, ?, ?, ?)", row)

    def failed(self, run: str, seed: int, reason: str) -> None:
        """Record that an episode came to no end."""
        row = (run, seed, None, reason, None, None)
        write(self._db, self._path, "INSERT OR REPLACE INTO episodes VALUES (?, ?, ?, ?, ?, ?)", row)

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
        query = "SELECT seed, count(DISTINCT decision) FROM replies WHERE agent = ? GROUP BY seed"
        return dict(self._db.execute(query, (self.agent,)))
