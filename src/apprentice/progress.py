"""What a run shows while it works: one line, rewritten in a terminal; elsewhere one is printed every half minute."""

import builtins
import logging
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_SEEN = 0.5
"""Seconds that the unit of work has to have taken before it is known how long it takes."""
EVERY = 30.0
"""Seconds between the lines, where it's no terminal."""


def quiet() -> None:
    """Let libraries keep to themselves what is meant for their programmers: deprecations, bars, reports of their use.

    For the programs of stages, and the processes that work for them. What the user has set stays.
    """
    unwanted = [("", "FutureWarning"), ("", "DeprecationWarning"), (_THREADS, "UserWarning")]
    for message, category in unwanted:
        warnings.filterwarnings("ignore", re.escape(message), getattr(builtins, category))
    os.environ.setdefault("PYTHONWARNINGS", ",".join(f"ignore:{message}:{category}" for message, category in unwanted))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' as well
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report each training to the hub
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


_THREADS = "OMP_NUM_THREADS/MKL_NUM_THREADS unset"
"""accelerate says so in each rank."""


def duration(seconds: float) -> str:
    """12 s, 3:05 min, 1:02 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


class Progress:
    """How far some work is, and how long what is left of it will take: each kind of it as long as it has taken so far.

    Only one is shown at a time, and in one process.
    """

    def __init__(self, name: str, plan: dict[str, int], done: int = 0, shown: bool = True):
        """plan: kinds of work → how often each is still to be done. The first is what's counted: `done` of it have been
        done before. shown: not in any other rank than the first."""
        self.name, self.plan, self.done, self.shown = name, dict(plan), done, shown
        self.unit = next(iter(plan))
        self.total = done + plan[self.unit]
        self.news = ""
        """What matters of it just now."""
        self._spent = dict.fromkeys(plan, (0.0, 0))
        self._warm = False
        """What comes next has no start of processes in it."""
        self._kind, self._now = self.unit, ""
        self._mark = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> "Progress":
        self._mark = time.monotonic()
        if self.shown:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            _clear()

    def begin(self, kind: str, shown: str = "") -> None:
        """This kind of work begins now; shown: its name, if another."""
        self._warm = True
        self._kind, self._now, self._mark = kind, shown or kind, time.monotonic()

    def end(self, kind: str, count: int = 1) -> None:
        """So much of a kind has been done since the last call."""
        now = time.monotonic()
        seconds, times = self._spent[kind]
        if kind != self.unit or self._warm:
            self._spent[kind] = seconds + now - self._mark, times + count
        self._warm = True
        self._kind, self._now, self._mark = self.unit, "", now
        self.plan[kind] -= count
        if kind == self.unit:
            self.done += count

    def left(self) -> float | None:
        """Seconds; None where some kind of work has not been seen yet."""
        spent = {kind: spent for kind, spent in self._spent.items() if spent[0] > (_SEEN if kind == self.unit else 0)}
        known = {kind: seconds / times for kind, (seconds, times) in spent.items()}
        ahead = {kind: count for kind, count in self.plan.items() if count > 0}
        if not known.keys() >= ahead.keys():
            return None
        under_way = min(time.monotonic() - self._mark, known.get(self._kind, 0.0))
        return max(0.0, sum(known[kind] * count for kind, count in ahead.items()) - under_way)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if self.shown:
            _clear()
            _write(f"{line}\n")

    def __str__(self) -> str:
        left, now = self.left(), f"{self._now} for {duration(time.monotonic() - self._mark)}" if self._now else ""
        counted = f"{self.name} {self.done}/{self.total}" + ("" if now or self.news else f" {self.unit}s")
        ahead = "" if left is None or not self.plan[self.unit] else f", {duration(left)} left"
        return f"{counted}{ahead}" + (f": {now or self.news}" if now or self.news else "")

    def _show(self) -> None:
        live = sys.stderr.isatty()
        while not self._ended.wait(0.5 if live else EVERY):
            if live:
                width = shutil.get_terminal_size().columns - 1
                _write(f"\r{str(self)[:width]}\x1b[K\r")
            else:
                _write(f"{self}\n")


def counted(items: Iterable[T], name: str, total: int, unit: str) -> Iterator[T]:
    """The items, while it's shown how many of them have come."""
    with Progress(name, {unit: total}) as progress:
        for item in items:
            yield item
            progress.end(unit)


def _clear() -> None:
    if sys.stderr.isatty():
        _write("\r\x1b[K")


def _write(text: str) -> None:
    """At once: print writes a line's end by itself, and another thread's line can come before it."""
    sys.stderr.write(text)
    sys.stderr.flush()
