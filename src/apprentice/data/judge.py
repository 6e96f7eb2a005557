"""A model as judge: an episode in words and a rubric go to an endpoint, a score from 0 to 1 comes back.

The score is a weighted mean of what the judge gives for the outcome and for each kind of event. Its answers are kept in
the ledger under all that was asked, so other weights or a rerun cost nothing; also those that have no marks, which were
paid for as well. A judge that fails costs no episode: there's just no score.
"""

import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from apprentice import prompt
from apprentice.endpoint.client import Client
from apprentice.endpoint.purse import Purse
from apprentice.endpoint.replies import Replies, shown_digest
from apprentice.episode import Episode, Reply, Step
from apprentice.errors import ConfigError, LimitReached, NoAnswer, WorkError
from apprentice.params import Judge
from apprentice.workers import together

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

    Raises ConfigError if the endpoint refuses the key or the model, OutOfMoney if its account has no credit. A limit
    of the settings that is reached is neither: what is left has no score.
    """
    return asyncio.run(_scores(episodes, settings))


def spent(settings: Judge) -> float | None:
    """Dollars that all of the judge's answers have cost; None if they aren't known."""
    with Purse(settings.endpoint, "judge") as purse:
        return purse.spent


async def _scores(episodes: Iterable[Episode], settings: Judge) -> list[Verdict]:
    found: dict[int, Verdict] = {}
    waiting = enumerate(episodes)
    stopped: ConfigError | WorkError | None = None
    with Replies("judge", settings.endpoint.asked, alone=True) as replies:
        client = Client(settings.endpoint, "judge.endpoint", "judge")

        async def one_after_the_other() -> None:
            nonlocal stopped
            for place, episode in waiting:
                try:
                    found[place] = await _judged(episode, settings, client, replies, stopped)
                except (ConfigError, WorkError) as error:
                    # What others have under way is still answered, and kept.
                    stopped = stopped or error
                    found[place] = Verdict(episode.id, None, str(stopped))

        async with client:
            await together(one_after_the_other() for _ in range(settings.endpoint.concurrency))
    if stopped and not isinstance(stopped, LimitReached):
        raise stopped
    return [found[place] for place in sorted(found)]


async def _judged(
    episode: Episode, settings: Judge, client: Client, replies: Replies, stopped: ConfigError | WorkError | None
) -> Verdict:
    asked, tools = messages(episode, settings), [_tool(settings)]
    shown = shown_digest(asked, tools)
    kept = replies.get(0, 0, shown)
    if kept:
        reply = kept[0]
    elif stopped:
        return Verdict(episode.id, None, str(stopped))
    else:
        try:
            answer = await client.complete(asked, tools)
        except NoAnswer as error:
            return Verdict(episode.id, None, str(error))
        message, finish = answer.message, answer.finish_reason
        reply = Reply(message, finish, answer.model, answer.prompt_tokens, answer.completion_tokens)
        replies.add(0, 0, shown, reply, answer.cost, answer.seconds)
    try:
        return Verdict(episode.id, score(reply.message, settings))
    except ValueError as error:
        cut = reply.finish_reason == "length"
        remedy = "it was cut off: raise max_tokens" if cut else "tool_choice: required makes most models give them"
        return Verdict(episode.id, None, f"{error}; other settings of judge.endpoint ask anew, and {remedy}")


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
    """The arguments of the judge's tool call, or the last JSON object with an outcome in its text."""
    for call in prompt.calls(message):
        if isinstance(call["arguments"], dict):
            return call["arguments"]
    text, found, at = prompt.said(message), None, 0
    while (at := text.find("{", at)) >= 0:
        try:
            given, end = json.JSONDecoder().raw_decode(text, at)
        except RecursionError:
            break
        except ValueError:
            given, end = None, at + 1
        # What has no outcome may have it further in.
        found, at = (given, end) if isinstance(given, dict) and "outcome" in given else (found, at + 1)
    if found is None:
        raise ValueError("the judge's answer has no marks")
    return found


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
