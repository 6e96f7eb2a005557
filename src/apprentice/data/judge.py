"""A model as judge: an episode in words and a rubric go to an endpoint, a score from 0 to 1 comes back.

The score is a weighted mean of what the judge gives for the outcome and for each kind of event. Its answers are kept in
the ledger under all that was asked, so other weights or a rerun cost nothing. A judge that fails costs no episode:
there's just no score.
"""

import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from apprentice import prompt
from apprentice.endpoint.client import Client
from apprentice.endpoint.replies import Replies, shown_digest
from apprentice.episode import Episode, Reply, Step
from apprentice.errors import NoAnswer, OutOfMoney
from apprentice.params import Judge

BEST = 10
"""The judge's own scale begins with 0."""
LINES = 400
"""Of an episode's story; of a longer one the middle is left out."""


@dataclass(frozen=True)
class Verdict:
    episode_id: str
    score: float | None
    """0 to 1; None if there is none."""
    why_not: str = ""


def scores(episodes: Iterable[Episode], settings: Judge) -> list[Verdict]:
    """A verdict for each episode, in their order; only as many episodes are in memory as are asked about at once.

    Raises ConfigError if the endpoint refuses the key or the model.
    """
    return asyncio.run(_scores(episodes, settings))


def spent(settings: Judge) -> float | None:
    """Dollars that all of the judge's answers have cost; None if a price was not known."""
    with Replies("judge", settings.endpoint.asked) as replies:
        return replies.spent()


async def _scores(episodes: Iterable[Episode], settings: Judge) -> list[Verdict]:
    found: dict[int, Verdict] = {}
    waiting = enumerate(episodes)
    stopped = ""
    with Replies("judge", settings.endpoint.asked, alone=True) as replies:
        client = Client(settings.endpoint, "judge.endpoint", replies.spent() or 0.0)

        async def one_after_the_other() -> None:
            nonlocal stopped
            for place, episode in waiting:
                try:
                    found[place] = await _judged(episode, settings, client, replies, stopped)
                except OutOfMoney as error:
                    stopped = str(error)
                    found[place] = Verdict(episode.id, None, stopped)

        try:
            async with client, asyncio.TaskGroup() as group:
                for _ in range(settings.endpoint.concurrency):
                    group.create_task(one_after_the_other())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return [found[place] for place in sorted(found)]


async def _judged(episode: Episode, settings: Judge, client: Client, replies: Replies, stopped: str) -> Verdict:
    asked, tools = messages(episode, settings), [_tool(settings)]
    shown = shown_digest(asked, tools)
    kept = replies.get(0, 0, shown)
    if kept:
        return Verdict(episode.id, score(kept[0].message, settings))
    if stopped:
        return Verdict(episode.id, None, stopped)
    try:
        answer = await client.complete(asked, tools)
        found = score(answer.message, settings)
    except (NoAnswer, ValueError) as error:
        return Verdict(episode.id, None, str(error))
    reply = Reply(answer.message, answer.finish_reason, answer.model, answer.prompt_tokens, answer.completion_tokens)
    replies.add(0, 0, shown, reply, answer.cost, answer.seconds)
    return Verdict(episode.id, found)


def score(message: dict, settings: Judge) -> float:
    """What an answer gives the episode, 0 to 1. Raises ValueError for one that cannot be read."""
    given = _given(message)
    events = given.get("events") if settings.events else {}
    if not isinstance(events, dict):
        raise ValueError("the judge's answer has no events")
    marks = [(settings.outcome.weight, given.get("outcome"))]
    marks += [(criterion.weight, events.get(name)) for name, criterion in settings.events.items()]
    for _, mark in marks:
        if isinstance(mark, bool) or not isinstance(mark, (int, float)) or not 0 <= mark <= BEST:
            raise ValueError(f"the judge's answer lacks a mark from 0 to {BEST}")
    total = sum(weight for weight, _ in marks)
    return round(sum(weight * mark for weight, mark in marks) / total / BEST, 3)


def _given(message: dict) -> dict:
    """The arguments of the judge's tool call, or the JSON object in its text."""
    calls, content = message.get("tool_calls"), prompt.said(message)
    try:
        text = calls[0]["function"]["arguments"] if calls else content[content.index("{") : content.rindex("}") + 1]
        given = json.loads(text) if isinstance(text, str) else text
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise ValueError("the judge's answer has no marks") from None
    if not isinstance(given, dict):
        raise ValueError("the judge's answer has no marks")
    return given


def messages(episode: Episode, settings: Judge) -> list[dict]:
    """What the judge is asked. Nothing that the player wrote is in it: a player can't talk to its judge."""
    events = [f"- events.{name}: {criterion.asks}" for name, criterion in settings.events.items()]
    rubric = "\n".join([f"- outcome: {settings.outcome.asks}", *events])
    task = (
        f"You judge how somebody played Crafter. Give each point of the rubric a mark from 0 (bad) to {BEST} (perfect) "
        "by calling the tool score."
    )
    story = f"The rubric:\n{rubric}\n\nThe episode:\n" + "\n".join(_shortened(list(_story(episode))))
    return [{"role": "system", "content": task}, {"role": "user", "content": story}]


def _tool(settings: Judge) -> dict:
    mark = {"type": "number", "minimum": 0, "maximum": BEST}
    properties: dict = {"outcome": mark}
    if settings.events:
        names = list(settings.events)
        properties["events"] = {"type": "object", "properties": dict.fromkeys(names, mark), "required": names}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": "score", "description": "Give the marks.", "parameters": parameters},
    }


def _story(episode: Episode) -> Iterator[str]:
    """The episode in lines: what the player had and did; what it did again and again without effect is one line."""

    def alike(step: Step) -> tuple:
        plain = not step.unlocked and not step.health_change and not step.invalid
        return (step.executed, step.observation.sleeping) if plain else (step.step,)

    for _, group in groupby(episode.steps, key=alike):
        steps = list(group)
        first, times = steps[0], len(steps)
        observation = first.observation
        vitals = " ".join(f"{name} {value}" for name, value in observation.vitals.items())
        owned = " ".join(f"{name} {count}" for name, count in observation.inventory.items() if count)
        happened = [f"unlocked {name}" for name in first.unlocked]
        happened += [f"health {first.health_change:+d}"] if first.health_change else []
        happened += ["an invalid reply"] if first.invalid else []
        actions = " ".join(first.executed) + (f" ×{times}" if times > 1 else "")
        line = f"step {first.step}: {vitals}; {owned or 'nothing owned'}; facing {prompt.ahead(observation)}; {actions}"
        yield line + (f" → {', '.join(happened)}" if happened else "")
    end = "the player died" if episode.steps[-1].died else "the player was alive"
    yield f"{end} after {episode.length} steps, with {len(episode.unlocked)} of 22 achievements"


def _shortened(lines: Sequence[str]) -> Sequence[str]:
    half = LINES // 2
    if len(lines) <= LINES:
        return lines
    return [*lines[:half], f"… {len(lines) - 2 * half} lines left out …", *lines[-half:]]
