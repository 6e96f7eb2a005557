"""Which episodes and decisions are worth imitating: filters with a funnel that says how many fell where."""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from apprentice import prompt
from apprentice.episode import Episode, Given, Step
from apprentice.params import Filter, Prompt


class NothingLeft(Exception):
    """The filters removed everything; the message names the one that took most and what would keep some."""


@dataclass
class Quality:
    """How good one teacher's play was and how much of it was kept, in sums."""

    imported: bool = False
    episodes: int = 0
    steps: int = 0
    decisions: int = 0
    achievements: int = 0
    invalid: int = 0
    kept_episodes: int = 0
    kept_decisions: int = 0
    judged: int = 0
    judge_score: float = 0.0

    def as_dict(self, cost: float | None) -> dict:
        """A row of `metrics/teachers.json`; None for what is not known. cost: dollars for all of its episodes."""
        known = not self.imported
        return {
            "episodes": self.episodes,
            "decisions": self.decisions,
            "achievements_mean": self.achievements / self.episodes if known else None,
            "steps_mean": self.steps / self.episodes if known else None,
            "invalid_rate": self.invalid / self.decisions,
            "judge_score_mean": self.judge_score / self.judged if self.judged else None,
            "kept_episodes": self.kept_episodes,
            "kept_decisions": self.kept_decisions,
            "kept_rate": self.kept_decisions / self.decisions,
            "cost_usd": cost,
            "cost_per_kept_decision_usd": cost / self.kept_decisions
            if cost is not None and self.kept_decisions
            else None,
        }


@dataclass
class Funnel:
    """How many fell where; what `metrics/filter.json` shows."""

    episodes: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    teachers: dict[str, Quality] = field(default_factory=dict)

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


def select(
    episodes: Iterable[Episode], settings: Filter, funnel: Funnel, scores: Mapping[str, float] | None = None
) -> Iterator[Episode]:
    """The episodes that pass, with the decisions that pass, one at a time; counts go to the funnel.

    scores: the judge's, by episode id; an episode that it could not score is not there. Raises NothingLeft at the end
    if no decision passed.
    """
    seen, scores = _Seen(), scores or {}
    best: dict[str, float] = {}
    for episode in episodes:
        funnel.episodes["read"] += 1
        funnel.decisions["read"] += len(episode.steps)
        quality = funnel.teachers.setdefault(episode.agent, Quality())
        score = scores.get(episode.id)
        _count(quality, episode, score)
        failed = _failed(episode, settings) or _failed_by_judge(episode, settings, score)
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
        quality.kept_episodes += 1
        quality.kept_decisions += len(kept)
        yield replace(episode, steps=tuple(kept))
    if not funnel.decisions["kept"]:
        raise NothingLeft(_why_nothing(settings, funnel, best))


def to_judge(episode: Episode, settings: Filter) -> bool:
    """Whether it depends on the judge if this episode passes."""
    return settings.min_judge_score is not None and not episode.imported and _failed(episode, settings) is None


def _count(quality: Quality, episode: Episode, score: float | None) -> None:
    quality.imported = episode.imported
    quality.episodes += 1
    quality.steps += episode.length
    quality.decisions += len(episode.steps)
    quality.achievements += len(episode.unlocked)
    quality.invalid += sum(bool(step.invalid) for step in episode.steps)
    if score is not None:
        quality.judged += 1
        quality.judge_score += score


def _failed(episode: Episode, settings: Filter) -> tuple[str, float] | None:
    """The first filter that the episode fails, and what it has of what is asked for."""
    tests = _episode_tests(episode, settings)
    return next(((name, value) for name, value, passes in tests if not passes), None)


def _failed_by_judge(episode: Episode, settings: Filter, score: float | None) -> tuple[str, float] | None:
    least = settings.min_judge_score
    if least is None or episode.imported:
        return None
    if score is None:
        return ("judge_missing", 0) if settings.judge_missing == "drop" else None
    return ("min_judge_score", score) if score < least else None


def _episode_tests(episode: Episode, settings: Filter) -> Iterator[tuple[str, int, bool]]:
    """(filter's name, what the episode has, does it pass), in the order in which they are applied.

    Of an imported episode only some decisions are known, and nothing that came of them: it is asked for nothing but
    valid replies.
    """
    if not episode.imported:
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
    shown_with = None if episode.imported else Prompt.model_validate_json(episode.prompt)
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
    """For each decision: how many identical actions in a row, this one included, have had no effect.

    Of imported ones the effect is not known: 0.
    """
    run, steps = 0, episode.steps
    if episode.imported:
        yield from [0] * len(steps)
        return
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


def _shown_and_answered(step: Step, settings: Prompt | None) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(step.observation, Given):
        digest.update(json.dumps(step.observation.messages).encode())
        digest.update(step.observation.png or b"")
    else:
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
        "judge_missing": "the judge could score none of the rest: set filter.judge_missing to keep",
    }
    remedy = remedies.get(worst, f"the nearest episode has {value}: set filter.{worst} to {value}")
    return (
        f"the filters removed everything; {worst} ({getattr(settings, worst)!r}) took most, {count} of "
        f"{funnel.decisions['read']} decisions: {remedy}"
    )
