"""Chats of others as episodes: OpenAI-format JSONL with pictures, read with distrust.

A line is {"messages": […]} and may have "metadata" with episode_id, step, seed and model, as the rows of `split` do.
Every assistant turn is a decision. It is kept with the system prompt and the turn right before it, since that's all a
student is ever shown. Lines are untrusted: nothing is fetched or unpickled, and sizes are bounded.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from apprentice import prompt
from apprentice.episode import Episode, Given, Reply, Step
from apprentice.world import png

LONGEST_LINE = 32 << 20
"""Bytes; as much as a chat of some hundred large pictures."""
LARGEST_PICTURE = 4 << 20
"""Pixels; a 2048 × 2048 picture."""
MOST_ACTIONS = 20
"""In one reply; no prompt of ours can allow more."""

_REMEDIES = {
    "not JSON": "write one JSON object a line",
    "no messages": 'give each line "messages" in OpenAI\'s chat form',
    "longer than 32 MB": "write one decision a line",
    "not valid Unicode": "write the file as UTF-8",
    "a role or content of an unknown kind": "write system, user, assistant and tool turns of text and image_url parts",
    "no assistant turn": "each line needs the reply that is to be imitated",
    "nothing shown before the reply": "put a user turn before each reply",
    "several pictures in a turn": "a student is shown one picture a turn",
    "a picture by address": "nothing is fetched: write pictures as data: URLs",
    "a broken picture": "write pictures as data:image/png;base64,…",
    "a picture over 4 megapixels": "make the pictures smaller",
    "the same episode and step again": "give each episode an episode_id of its own",
    "an episode on two seeds": "give each episode an episode_id of its own",
    "played on a world of the benchmark": "leave out benchmark.seeds: results on worlds already seen would not count",
    "weight 0": "its author asks not to train on it",
}
"""Why a line or a decision is left out, and what its author can do."""


class NothingUsable(Exception):
    """A file without one decision to imitate; the message names what is wrong with most of it, and the remedy."""


class _Refused(Exception):
    """Why a line or a decision is left out; one of _REMEDIES."""


@dataclass
class Report:
    """How much of a file was usable; what `metrics/imports/<name>.json` shows."""

    lines: Counter[str] = field(default_factory=Counter)
    """`read`, and those left out whole, by reason."""
    decisions: Counter[str] = field(default_factory=Counter)
    """`read`; `kept`; those left out, by reason."""
    invalid: Counter[str] = field(default_factory=Counter)
    """Of those kept: replies that cannot be read, by reason; `filter` deals with them as with anybody's."""

    @property
    def left_out(self) -> Counter[str]:
        """Lines and decisions that are not used, by reason."""
        return Counter({name: n for name, n in (self.lines + self.decisions).items() if name in _REMEDIES})

    def as_dict(self) -> dict:
        return {name: dict(counts.most_common()) for name, counts in vars(self).items()}


def read(path: Path, name: str, report: Report, held_out: Collection[int] = ()) -> Iterator[Episode]:
    """The episodes of a file as those of the import `name`, each with its decisions in order; counts go to the report.

    held_out: world seeds that nothing may be learnt from. The file is read twice: memory holds the places of the
    decisions, not the decisions. Raises NothingUsable at the end if no reply in it can be read.
    """
    places = sorted(_places(path, report, frozenset(held_out)))
    with path.open("rb") as file:

        @lru_cache(maxsize=1)  # the turns of a long chat come one after the other
        def turns(offset: int) -> list[_Turn]:
            file.seek(offset)
            return _turns(_row(file.readline(LONGEST_LINE + 1)))

        for (_, episode_id, seed), group in groupby(places, key=lambda place: (place.order, place.name, place.seed)):
            steps = []
            for place in group:
                if steps and place.step == steps[-1].step:
                    report.decisions["the same episode and step again"] += 1
                    continue
                try:
                    steps.append(_step(turns(place.offset)[place.turn], place.step, name, report))
                except _Refused as refused:
                    report.decisions[str(refused)] += 1
            if steps:
                report.decisions["kept"] += len(steps)
                yield Episode(name, seed, tuple(steps), name=episode_id)
    if report.decisions["kept"] == report.invalid.total():
        raise NothingUsable(f"{path}: {_why_nothing(report)}")


@dataclass(frozen=True, order=True)
class _Place:
    """Where a decision stands in the file, and in which order it comes out."""

    order: int
    """The line that its episode begins on."""
    step: int
    offset: int
    turn: int
    name: str
    seed: int | None


@dataclass(frozen=True)
class _Turn:
    """A decision as it stands in a line, the picture not yet decoded."""

    messages: tuple[dict, ...]
    picture: str | None
    """The data: URL."""
    answer: dict
    model: str
    refused: str = ""


def _places(path: Path, report: Report, held_out: frozenset[int]) -> Iterator[_Place]:
    """Where the decisions of a file are; reads every line once."""
    first: dict[str, tuple[int, int | None]] = {}
    following: Counter[str] = Counter()
    for number, (offset, line) in enumerate(_lines(path)):
        report.lines["read"] += 1
        try:
            row = _row(line)
            episode_id, step, seed = _metadata(row)
            if seed in held_out:
                raise _Refused("played on a world of the benchmark")
            key = episode_id or f"line-{number}"
            order, same_seed = first.setdefault(key, (number, seed))
            if seed != same_seed:
                raise _Refused("an episode on two seeds")
            turns = _turns(row)
            if not turns:
                raise _Refused("no assistant turn")
        except _Refused as refused:
            report.lines[str(refused)] += 1
            continue
        step = following[key] if step is None else step
        for index, turn in enumerate(turns):
            report.decisions["read"] += 1
            if turn.refused:
                report.decisions[turn.refused] += 1
            else:
                yield _Place(order, step, offset, index, key, seed)
            step += len(prompt.parse(turn.answer, MOST_ACTIONS).actions) or 1
        following[key] = step


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(place, line) of each line that is not blank; of one that is too long no more than it takes to know that."""
    with path.open("rb") as file:
        offset = 0
        while line := file.readline(LONGEST_LINE + 1):
            if line.strip():
                yield offset, line
            rest = line
            while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST_LINE + 1)
            offset = file.tell()


def _row(line: bytes) -> dict:
    if len(line) > LONGEST_LINE:
        raise _Refused("longer than 32 MB")
    try:
        row = json.loads(line.decode("utf-8-sig"))
        # Half characters get through JSON, but not into a file.
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError:
        raise _Refused("not valid Unicode") from None
    except (ValueError, RecursionError):
        raise _Refused("not JSON") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _Refused("no messages")
    return row


def _metadata(row: dict) -> tuple[str, int | None, int | None]:
    """(episode_id, step, seed): an empty text and None for what it does not say in a form that can be used."""
    metadata = row.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}

    def number(name: str, limit: int) -> int | None:
        value = metadata.get(name)
        return value if type(value) is int and 0 <= value < limit else None

    episode_id = metadata.get("episode_id")
    episode_id = str(episode_id) if isinstance(episode_id, (str, int)) else ""
    return episode_id[:200], number("step", 10**9), number("seed", 2**31)


def _turns(row: dict) -> list[_Turn]:
    """The decisions of a line. Raises _Refused if the chat itself is of a kind that we don't know."""
    metadata = row.get("metadata")
    model = metadata.get("model") if isinstance(metadata, dict) else None
    found, system, shown = [], [], []
    for message in row["messages"]:
        role, content = message.get("role"), message.get("content")
        if role in ("system", "developer"):
            system.append({"role": "system", "content": _text(content)})
        elif role == "user":
            shown.append(content)
        elif role in ("tool", "function"):
            shown.append([{"type": "text", "text": _text(content)}])
        elif role == "assistant":
            content = prompt.said(message) if isinstance(content, list) else content
            answer = {"role": "assistant", "content": content, "tool_calls": message.get("tool_calls")}
            turn = _Turn((), None, answer, model[:100] if isinstance(model, str) else "")
            try:
                if message.get("weight") == 0:
                    raise _Refused("weight 0")
                content, picture = _content(shown)
                user = {"role": "user", "content": content}
                found.append(replace(turn, messages=(*system, user), picture=picture))
            except _Refused as refused:
                found.append(replace(turn, refused=str(refused)))
            shown = []
        else:
            raise _Refused("a role or content of an unknown kind")
    return found


def _content(shown: list) -> tuple[str | list[dict], str | None]:
    """What a user's turn says, with {"type": "image"} for the picture, and the picture's URL."""
    if not shown:
        raise _Refused("nothing shown before the reply")
    if len(shown) == 1 and isinstance(shown[0], str):
        return shown[0], None
    parts, pictures = [], []
    for content in shown:
        for part in _parts(content):
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
                continue
            url = part["image_url"]
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise _Refused("a broken picture")
            if not url.startswith("data:"):
                raise _Refused("a picture by address")
            pictures.append(url)
            parts.append({"type": "image"})
    if len(pictures) > 1:
        raise _Refused("several pictures in a turn")
    return parts, pictures[0] if pictures else None


def _parts(content: object) -> list[dict]:
    """Content as a list of text and image_url parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        text = [part.get("type") == "text" and isinstance(part.get("text"), str) for part in content]
        picture = [part.get("type") == "image_url" and "image_url" in part for part in content]
        if all(one or other for one, other in zip(text, picture, strict=True)):
            return content
    raise _Refused("a role or content of an unknown kind")


def _text(content: object) -> str:
    parts = _parts(content)
    if any(part["type"] != "text" for part in parts):
        raise _Refused("a role or content of an unknown kind")
    return "".join(part["text"] for part in parts)


def _step(turn: _Turn, step: int, name: str, report: Report) -> Step:
    picture = None if turn.picture is None else _png(turn.picture)
    parsed = prompt.parse(turn.answer, MOST_ACTIONS)
    if parsed.invalid:
        # Without the names and numbers that the reply made up: there may be as many as lines.
        report.invalid[re.sub(r"^\d+ | ['\"].*", "", parsed.invalid, flags=re.DOTALL)] += 1
    return Step(
        step=step,
        history=(),
        observation=Given(turn.messages, picture),
        reply=Reply(turn.answer, model=turn.model or name),
        asked=parsed.actions,
        invalid=parsed.invalid,
        executed=parsed.actions,
        reward=0.0,
        health_change=0,
        unlocked=(),
        done=False,
        died=False,
    )


def _png(url: str) -> bytes:
    """The picture of a data: URL, encoded anew, so that what comes after reads only PNG files of our own making."""
    try:
        data = base64.b64decode("".join(url.partition(",")[2].split()), validate=True)
        # Pillow reads dozens of formats; the fewer decoders meet a stranger's bytes, the better.
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF")) as image:
            if image.width * image.height > LARGEST_PICTURE:
                raise _Refused("a picture over 4 megapixels")
            return png.encode(np.asarray(image.convert("RGB")))
    except _Refused:
        raise
    except Image.DecompressionBombError:
        raise _Refused("a picture over 4 megapixels") from None
    except Exception:  # Pillow's decoders raise whatever they come upon
        raise _Refused("a broken picture") from None


def _why_nothing(report: Report) -> str:
    reasons = report.left_out
    if report.invalid:
        reason, count = report.invalid.most_common(1)[0]
        actions = 'call the tool act with {"actions": ["move_left", …]}, by the names that Crafter\'s actions have'
        return f"no reply can be read, {count} of {report.invalid.total()} because: {reason}; {actions}"
    if not reasons:
        return "the file is empty"
    reason, count = reasons.most_common(1)[0]
    return f"nothing in it can be used, {count} times because: {reason}; {_REMEDIES[reason]}"


def summary(report: Report) -> str:
    """The report in a sentence."""
    counts = [*report.left_out.most_common(), *report.invalid.most_common()]
    reasons = [f"{count} × {reason}" for reason, count in counts]
    kept = report.decisions["kept"]
    return f"{kept} decisions from {report.lines['read']} lines" + (f"; {', '.join(reasons)}" if reasons else "")
