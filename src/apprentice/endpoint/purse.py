"""What an endpoint is paid: one purse for all who ask it with the same settings, in any number of processes.

A request is written down before it is sent, with the most that it can cost, and again when its answer says what it has
cost. So a request that is lost, or whose process was killed, counts in full. How much the most is has to be learned:
a model may use more than was asked for. Where there is a limit, the first request goes alone, then no more go at once
than have been answered, and the most is what has been seen to be the most.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from apprentice.cache import cache_folder
from apprentice.endpoint import prices
from apprentice.errors import LimitReached
from apprentice.files import locked
from apprentice.fingerprint import hashed
from apprentice.ledger import opened, transaction, write
from apprentice.params import Endpoint

_TABLES = (
    # Requests without an end: under way, or lost with their process. Tokens are the most that there can be.
    "CREATE TABLE IF NOT EXISTS requests (number INTEGER PRIMARY KEY, agent TEXT, process INTEGER, until REAL, "
    "prompt_tokens INTEGER, completion_tokens INTEGER)",
    # The sums of all others. The tokens are of those whose dollars are not known.
    "CREATE TABLE IF NOT EXISTS payments (agent TEXT PRIMARY KEY, dollars REAL, unknown INTEGER, "
    "prompt_tokens INTEGER, completion_tokens INTEGER, answered INTEGER, excess REAL)",
)
_GRACE = 60.0
"""Seconds after its time-out in which a request of a living process may still end."""


def path(asked: dict) -> Path:
    """Where payments and replies of an endpoint with these settings (`Endpoint.asked`) are kept."""
    return cache_folder() / "replies" / f"{hashed(asked)}.sqlite"


def database(path: Path, tables: Iterable[str]) -> sqlite3.Connection:
    """The database of this path, with these tables; any number of processes may use it at once."""
    db = opened(path)
    # Two that make it a database with a WAL at once would meet "database is locked", whatever the time-out.
    with locked(path.with_suffix(".opening"), f"{path.name}: waiting for another process that opens it"):
        # Safe from a killed process, if not from a power cut; without a sync to disk, a record takes 0.2 ms.
        for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL", *tables):
            write(db, path, statement)
    return db


@dataclass(eq=False)
class Payment:
    """For one request. It begins as the most that it can be; who reads the answer writes into it what is known."""

    prompt_tokens: int
    completion_tokens: int
    dollars: float | None = None
    """None if they are not known."""
    answered: bool = False
    """The model has answered, whatever it was; False after a time-out or an error of the server."""


@dataclass(frozen=True)
class _State:
    """What the purse has paid, and what is under way."""

    dollars: float
    """Of all payments that are known."""
    unknown: int
    """How many are not known, requests that were lost among them."""
    most: float
    """Dollars that those, and what is under way, can have cost at most; 0 without a price."""
    under_way: int
    answered: int
    excess: float
    """How many times what was thought to be the most a request has cost at most; 1 or more."""


class Purse:
    """The purse of an endpoint, held by one who asks it.

    agent: who asks. whose: where the endpoint's settings stand, for error messages.
    """

    def __init__(self, endpoint: Endpoint, agent: str, whose: str = ""):
        self.endpoint, self.agent, self.whose = endpoint, agent, whose
        self.price = prices.price(endpoint)
        self._path = path(endpoint.asked)
        self._db = database(self._path, _TABLES)
        self._changed = asyncio.Event()

    def __enter__(self) -> "Purse":
        return self

    def __exit__(self, *exception) -> None:
        self._db.close()

    @property
    def known(self) -> float:
        """Dollars that this agent is known to have paid."""
        return self._state(self.agent).dollars

    @property
    def spent(self) -> float | None:
        """Dollars that this agent has paid. What is not known counts in full where there is a limit; else it's None."""
        state = self._state(self.agent)
        if self.endpoint.max_cost_usd is not None and self.price:
            return state.dollars + state.most
        return None if state.unknown else state.dollars

    @asynccontextmanager
    async def opened(self, prompt_tokens: int, completion_tokens: int) -> AsyncIterator[Payment]:
        """Pay for one request of at most so many tokens, when this fits beside what is under way.

        Raises LimitReached when it cannot fit any more.
        """
        payment = Payment(prompt_tokens, completion_tokens)
        number = await self._begun(payment)
        try:
            yield payment
        finally:
            self._ended(number, payment)

    async def _begun(self, payment: Payment) -> int:
        limit = self.endpoint.max_cost_usd
        while True:
            changed = self._changed
            with transaction(self._db, self._path):
                state = self._state() if limit is not None else None
                if state is None or self._fits(state, payment):
                    until = time.time() + self.endpoint.timeout + _GRACE
                    row = (self.agent, os.getpid(), until, payment.prompt_tokens, payment.completion_tokens)
                    write(self._db, self._path, "INSERT INTO requests VALUES (NULL, ?, ?, ?, ?, ?)", row)
                    return self._db.execute("SELECT last_insert_rowid()").fetchone()[0]
            if not state.under_way:
                raise LimitReached(self._empty(state, payment))
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), 0.5)  # another process changes it without a word

    def _fits(self, state: _State, payment: Payment) -> bool:
        limit = self.endpoint.max_cost_usd
        within = limit is None or state.dollars + state.most + self._most(payment, state.excess) <= limit
        return within and state.under_way <= state.answered

    def _most(self, payment: Payment, excess: float) -> float:
        return self._dollars(payment.prompt_tokens, payment.completion_tokens) * excess

    def _dollars(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What these tokens cost; 0 without a price, where there is no limit either."""
        return prices.dollars(self.price, prompt_tokens, completion_tokens) if self.price else 0.0

    def _ended(self, number: int, payment: Payment) -> None:
        """Write down the dollars; where they aren't known, the tokens, or the most that those can be."""
        with transaction(self._db, self._path):
            begun = self._db.execute(
                "SELECT prompt_tokens, completion_tokens FROM requests WHERE number = ?", (number,)
            ).fetchone()
            excess = self._state().excess
            known = payment.dollars is not None
            tokens = (0, 0) if known else (payment.prompt_tokens, payment.completion_tokens)
            if not known and tokens == begun:
                tokens = (round(tokens[0] * excess), round(tokens[1] * excess))
            if not known and self.endpoint.max_cost_usd is not None:
                payment.dollars = self._dollars(*tokens)
            thought = self._dollars(*begun)
            if payment.dollars is not None and known and thought:
                excess = max(excess, payment.dollars / thought)
            row = (self.agent, payment.dollars if known else 0.0, not known, *tokens, payment.answered, excess)
            write(
                self._db,
                self._path,
                "INSERT INTO payments VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "dollars = dollars + excluded.dollars, unknown = unknown + excluded.unknown, "
                "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
                "completion_tokens = completion_tokens + excluded.completion_tokens, "
                "answered = answered + excluded.answered, excess = excluded.excess",
                row,
            )
            write(self._db, self._path, "DELETE FROM requests WHERE number = ?", (number,))
        self._changed.set()
        self._changed = asyncio.Event()

    def _state(self, agent: str | None = None) -> _State:
        """Of one agent, or of all."""
        of = "WHERE agent = coalesce(?, agent)"
        dollars, unknown, prompt, completion, answered, excess = self._db.execute(
            "SELECT coalesce(sum(dollars), 0.0), coalesce(sum(unknown), 0), coalesce(sum(prompt_tokens), 0), "
            f"coalesce(sum(completion_tokens), 0), coalesce(sum(answered), 0), coalesce(max(excess), 1.0) "
            f"FROM payments {of}",
            (agent,),
        ).fetchone()
        most = self._dollars(prompt, completion)
        under_way, now = 0, time.time()
        for process, until, *tokens in self._db.execute(
            f"SELECT process, until, prompt_tokens, completion_tokens FROM requests {of}", (agent,)
        ):
            lives = now < until and _lives(process)
            under_way += lives
            unknown += not lives
            most += excess * self._dollars(*tokens)
        return _State(dollars, unknown, most, under_way, answered, excess)

    def _empty(self, state: _State, payment: Payment) -> str:
        counted = " (what is not known counts as the most it can be)" if state.unknown else ""
        return (
            f"{self.whose}.max_cost_usd: ${state.dollars + state.most:.4f} of ${self.endpoint.max_cost_usd:g} are "
            f"spent{counted} and another request may cost ${self._most(payment, state.excess):.4f}; everything so far "
            "is kept, a higher limit continues"
        )


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
