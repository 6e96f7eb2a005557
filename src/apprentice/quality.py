"""Which episodes and decisions are worth imitating: filters with a funnel that says how many fell where."""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from apprentice import prompt
from apprentice.episode import Episode, Step
from apprentice.params import Filter, Prompt


class NothingLeft(Exception):
    """The filters removed everything; the message names the one that took most and what would keep some."""


@dataclass
class Funnel:
    """How many fell where; what `metrics/filter.json` shows."""

    episodes: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict:
        return {"episodes": dict(self.episodes), "decisions": dict(self.decisions)}


class _Seen:
    """A set of hashes on disk, so that memory does not grow with what was seen."""

    def __init__(self):
        self._db = sqlite3.connect("")  # a temporary file, gone when closed
        self._db.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, digest: bytes) -> bool:
        """True if it is new."""
        return self._db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1


def select(episodes: Iterable[Episode], settings: Filter, funnel: Funnel) -> Iterator[Episode]:
    """The episodes that pass, with the decisions that pass, one at a time; counts go to the funnel.

    Raises NothingLeft at the end if no decision passed.
    """
    seen = _Seen()
    best: dict[str, int] = {}
    for episode in episodes:
        funnel.episodes["read"] += 1
        funnel.decisions["read"] += len(episode.steps)
        failed = next(((name, value) for name, value, passes in _episode_tests(episode, settings) if not passes), None)
        if failed:
            name, value = failed
            funnel.episodes[name] += 1
            funnel.decisions[name] += len(episode.steps)
            closer = min if name.startswith("max") else max
            best[name] = closer(best.get(name, value), value)
            continue
        kept = []
        for step, fallen in zip(episode.steps, _decision_tests(episode, settings, seen), strict=True):
            if fallen:
                funnel.decisions[fallen] += 1
            else:
                kept.append(step)
        if not kept:
            funnel.episodes["no decision left"] += 1
            continue
        funnel.episodes["kept"] += 1
        funnel.decisions["kept"] += len(kept)
        yield replace(episode, steps=tuple(kept))
    if not funnel.decisions["kept"]:
        raise NothingLeft(_why_nothing(settings, funnel, best))


def _episode_tests(episode: Episode, settings: Filter) -> Iterator[tuple[str, int, bool]]:
    """(filter's name, what the episode has, does it pass), in the order in which they are applied."""
    most = settings.max_steps_per_episode
    yield "min_steps_per_episode", episode.length, episode.length >= settings.min_steps_per_episode
    yield "max_steps_per_episode", episode.length, most is None or episode.length <= most
    count = len(episode.unlocked)
    yield "min_achievements_per_episode", count, count >= settings.min_achievements_per_episode
    if settings.min_unique_states:
        states = len({_state(step) for step in episode.steps})
        yield "min_unique_states", states, states >= settings.min_unique_states
    if settings.require_valid_tool_calls == "episode":
        valid = sum(not step.invalid for step in episode.steps)
        yield "require_valid_tool_calls", valid, valid == len(episode.steps)
    if settings.detect_loops == "episode":
        run = max(_repeats(episode), default=0)
        yield "max_repeated_actions", run, run <= settings.max_repeated_actions


def _decision_tests(episode: Episode, settings: Filter, seen: _Seen) -> Iterator[str]:
    """For each decision the name of the filter that it fails, or an empty text."""
    shown_with = Prompt.model_validate_json(episode.prompt)
    for step, run in zip(episode.steps, _repeats(episode), strict=True):
        if step.invalid and settings.require_valid_tool_calls != "off":
            yield "require_valid_tool_calls"
        elif settings.detect_loops != "off" and run > settings.max_repeated_actions:
            yield "max_repeated_actions"
        elif settings.deduplicate and not seen.add(_shown_and_answered(step, shown_with)):
            yield "deduplicate"
        else:
            yield ""


def _repeats(episode: Episode) -> Iterator[int]:
    """For each decision: how many identical actions in a row, this one included, have had no effect."""
    run, steps = 0, episode.steps
    for index, step in enumerate(steps):
        after = steps[index + 1] if index + 1 < len(steps) else None
        idle = after is not None and _state(step) == _state(after) and not step.reward and not step.unlocked
        same = index > 0 and step.executed == steps[index - 1].executed and len(set(step.executed)) == 1
        run = (run + 1 if same and run else 1) if idle else 0
        yield run


def _state(step: Step) -> tuple:
    """What an action can change: not the creatures and vitals, which change by themselves."""
    observation = step.observation
    return (
        observation.position,
        observation.facing,
        observation.sleeping,
        observation.daylight if observation.sleeping else None,
        tuple(observation.inventory.values()),
        prompt.ahead(observation),
    )


def _shown_and_answered(step: Step, settings: Prompt) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(prompt.text(step.observation, settings, step.history).encode())
    if settings.mode != "text":
        digest.update(prompt.shown_png(step.observation, settings))
    digest.update(repr(step.asked or step.reply.message).encode())
    return digest.digest()


def _why_nothing(settings: Filter, funnel: Funnel, best: dict[str, int]) -> str:
    if not funnel.episodes["read"]:
        return "there are no episodes to filter: collect some first"
    fallen = Counter({name: n for name, n in funnel.decisions.items() if name not in ("read", "kept")})
    worst, count = fallen.most_common(1)[0]
    value = best.get(worst)
    remedies = {
        "require_valid_tool_calls": (
            f"the best episode has {value} valid replies: set filter.require_valid_tool_calls to decision"
            if value
            else "no reply is valid: look at the teacher's replies, or set filter.require_valid_tool_calls to off"
        ),
        "max_repeated_actions": (
            "raise it, or set filter.detect_loops to off"
            if value is None
            else f"the best episode repeats an action {value} times: set filter.max_repeated_actions to {value}, "
            "or set filter.detect_loops to decision"
        ),
        "deduplicate": "set filter.deduplicate to false",
    }
    remedy = remedies.get(worst, f"the nearest episode has {value}: set filter.{worst} to {value}")
    return (
        f"the filters removed everything; {worst} ({getattr(settings, worst)!r}) took most, {count} of "
        f"{funnel.decisions['read']} decisions: {remedy}"
    )
