"""Decisions of others as episodes: OpenAI-format JSONL with pictures, or a trace; read with distrust.

A line is {"messages": […]} and may have "metadata" with episode_id, step, seed and model, as the rows of `split` do.
Every assistant turn is a decision. It is kept with the system prompt and the turn right before it, since that's all a
student is ever shown. Pictures stand in their turn, as parts, or beside it: under `images` of the line or of the
message, where `<image>` in a text or a part without a picture is the place of each (ms-swift, LLaMA-Factory, TRL).
Lines are untrusted: nothing is fetched or unpickled, and sizes are bounded.

A trace (data/traces/*.parquet of another checkout) comes with all that it knows of each episode.
"""

import base64
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from pyarrow.lib import ArrowException

from apprentice import prompt, store
from apprentice.episode import Episode, Given, Reply, Step
from apprentice.params import Prompt, Tool
from apprentice.world import png
from apprentice.world.observation import SIZE

LONGEST_LINE = 32 << 20
"""Bytes; as much as a chat of some hundred large pictures."""
LARGEST_PICTURE = 4 << 20
"""Pixels; a 2048 × 2048 picture."""
LONGEST_STRIP = 200
"""How many times as long as wide a picture may be; Qwen3-VL's processor takes no longer ones."""
MOST_ACTIONS = 20
"""In one reply; no prompt of ours can allow more."""

_KEPT = "played on a world kept for evaluation"
_AGAIN = "the same episode and step again"
_NO_DECISION = "no decision as this version records them"
_REMEDIES = {
    "not JSON": "write one JSON object a line",
    "no messages": 'give each line "messages" in OpenAI\'s chat form',
    "conversations (ShareGPT)": 'give each line "messages" in OpenAI\'s chat form',
    "videos or audios": "a student is shown pictures and text only",
    "pictures beside the text that do not match their places": "write as many <image> as there are pictures",
    "a picture's place without the picture": "put the picture there, as a part image_url with a data: URL",
    "a picture inside the text": "write pictures as parts image_url with a data: URL",
    "longer than 32 MB": "write one decision a line",
    "not valid Unicode": "write the file as UTF-8",
    "a role or content of an unknown kind": "write system, user, assistant and tool turns of text and image_url parts",
    "no assistant turn": "each line needs the reply that is to be imitated",
    "nothing shown before the reply": "put a user turn before each reply",
    "several pictures in a turn": "a student is shown one picture a turn",
    "an empty picture URL": "put the picture there, or leave the part out",
    "a picture by address": "nothing is fetched: write pictures as data: URLs",
    "a broken picture": "write pictures as data:image/png;base64,…, in PNG, JPEG, WEBP or GIF",
    "a picture over 4 megapixels": "make the pictures smaller",
    "a picture more than 200 times as long as wide": "cut it, or give it a border",
    "an animated picture": "write the one picture that was shown",
    _AGAIN: "give each episode an episode_id of its own",
    "an episode on two seeds": "give each episode an episode_id of its own",
    "a seed that is no whole number below 2147483648": "write the world's seed, or null where there is none",
    _KEPT: "leave out the seeds of the benchmark and of evaluation in sft and rl: results on worlds already seen would "
    "not count",
    "weight 0": "its author asks not to train on it",
    _NO_DECISION: "export it there: apprentice export openai, and import its JSONL",
}
"""Why a line or a decision is left out, and what its author can do."""


class NothingUsable(Exception):
    """A file without one decision to imitate; the message names what is wrong with most of it, and the remedy."""


Tools = Mapping[str, Tool]
"""What calls of others' tools mean, by the tool's name."""


_EVERYTHING = Prompt(mode="text+image", inventory="all", position=True, history=1)


class _Refused(Exception):
    """Why a line or a decision is left out; one of _REMEDIES."""


@dataclass
class Report:
    """How much of a file was usable; what `metrics/imports/<name>.json` shows."""

    lines: Counter[str] = field(default_factory=Counter)
    """`read`, and those left out whole, by reason."""
    decisions: Counter[str] = field(default_factory=Counter)
    """`read`; `usable`; `unreadable`, whose reply cannot be read; those left out, by reason."""
    invalid: Counter[str] = field(default_factory=Counter)
    """The unreadable ones, by reason; they are in the trace, where `filter` deals with them as with anybody's."""
    tools: Counter[str] = field(default_factory=Counter)
    """The tools that unreadable replies call, the first ten."""
    pictures: Counter[str] = field(default_factory=Counter)
    """Of the usable ones: `with` a picture, and `without`."""

    def add(self, step: Step) -> None:
        """Count a decision that gets into the trace."""
        if not step.invalid:
            self.decisions["usable"] += 1
            shown = not isinstance(step.observation, Given) or step.observation.png is not None
            self.pictures["with" if shown else "without"] += 1
            return
        self.decisions["unreadable"] += 1
        # Without the names and numbers that the reply made up: there may be as many as lines.
        self.invalid[re.sub(r"^\d+ | ['\"].*", "", step.invalid, flags=re.DOTALL)] += 1
        tool = re.fullmatch("unknown tool '(.*)'", step.invalid)
        if tool and (tool[1] in self.tools or len(self.tools) < 10):
            self.tools[tool[1]] += 1

    @property
    def left_out(self) -> Counter[str]:
        """Lines and decisions that are not used, by reason."""
        return Counter({name: n for name, n in (self.lines + self.decisions).items() if name in _REMEDIES})

    def as_dict(self) -> dict:
        return {name: dict(counts.most_common()) for name, counts in vars(self).items()}


def read(
    path: Path, name: str, report: Report, held_out: Collection[int] = (), tools: Tools | None = None
) -> Iterator[Episode]:
    """The episodes of a file as those of the import `name`, each with its decisions in order; counts go to the report.

    held_out: world seeds that nothing may be learnt from. tools: what calls of other tools than `act` mean, in JSONL.
    JSONL is read twice: memory holds the places of the decisions, not the decisions. Raises NothingUsable at the end if
    no reply in it can be read.
    """
    if path.suffix == ".parquet":
        yield from _trace(path, name, report, frozenset(held_out))
    else:
        yield from _chats(path, name, report, frozenset(held_out), tools or {})
    if not report.decisions["usable"]:
        raise NothingUsable(f"{path}: {_why_nothing(report, name, path)}")


def _trace(path: Path, name: str, report: Report, held_out: frozenset[int]) -> Iterator[Episode]:
    """The episodes of a trace with all that it knows of them."""
    seen: set[str] = set()
    try:
        columns = pq.read_schema(path)
        if "ending" not in columns.names:  # older traces lack it
            columns = columns.append(store.SCHEMA.field("ending"))
        if not columns.equals(store.SCHEMA):
            raise NothingUsable(f"{path} has other columns than a trace of this version; {_REMEDIES[_NO_DECISION]}")
        for episode in store.read(path):
            count = len(episode.steps)
            report.lines["read"] += count
            if episode.seed in held_out:
                report.lines[_KEPT] += count
                continue
            report.decisions["read"] += count
            if episode.id in seen or not _known(episode):
                report.decisions[_AGAIN if episode.id in seen else _NO_DECISION] += count
                continue
            seen.add(episode.id)
            for step in episode.steps:
                report.add(step)
            yield replace(episode, agent=name, name=episode.id)
    except (ArrowException, OSError, ValueError, TypeError) as error:
        raise NothingUsable(f"{path} is damaged, or no trace: {str(error)[:200]}") from None


def _known(episode: Episode) -> bool:
    """Whether all that later stages look at can be read."""
    try:
        if not episode.imported:
            Prompt.model_validate_json(episode.prompt)
        for step in episode.steps:
            shown = step.observation
            if shown.png is not None and math.prod(png.size(shown.png)) > LARGEST_PICTURE:
                return False
            picture = None if shown.png is None else png.decode(shown.png)
            if isinstance(shown, Given):
                prompt.given(shown)
                continue
            prompt.text(shown, _EVERYTHING, step.history)
            if picture is None or picture.shape != (SIZE, SIZE, 3):
                return False
    except Exception:  # whatever a file may hold that is not ours
        return False
    return True


def _chats(path: Path, name: str, report: Report, held_out: frozenset[int], tools: Tools) -> Iterator[Episode]:
    places = sorted(_places(path, report, held_out, tools))
    with path.open("rb") as file:

        @lru_cache(maxsize=1)  # the turns of a long chat come one after the other
        def turns(offset: int) -> list[_Turn]:
            file.seek(offset)
            return _turns(_row(file.readline(LONGEST_LINE + 1)))

        for (_, episode_id, seed), group in groupby(places, key=lambda place: (place.order, place.name, place.seed)):
            steps = []
            for place in group:
                if steps and place.step == steps[-1].step:
                    report.decisions[_AGAIN] += 1
                    continue
                try:
                    steps.append(_step(turns(place.offset)[place.turn], place.step, name, tools))
                except _Refused as refused:
                    report.decisions[str(refused)] += 1
            for step in steps:
                report.add(step)
            if steps:
                yield Episode(name, seed, tuple(steps), name=episode_id)


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
    """A data: URL, or base64."""
    answer: dict
    model: str
    refused: str = ""


def _places(path: Path, report: Report, held_out: frozenset[int], tools: Tools) -> Iterator[_Place]:
    """Where the decisions of a file are; reads every line once."""
    first: dict[str, tuple[int, int | None]] = {}
    following: Counter[str] = Counter()
    for number, (offset, line) in enumerate(_lines(path)):
        report.lines["read"] += 1
        try:
            row = _row(line)
            episode_id, step, seed = _metadata(row)
            if seed in held_out:
                raise _Refused(_KEPT)
            key = episode_id or f"line-{number}"
            order, same_seed = first.setdefault(key, (number, seed))
            if seed != same_seed:
                raise _Refused("an episode on two seeds")
            turns = _turns(row)
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
            step += len(_parsed(turn.answer, tools).actions) or 1
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
    if messages is None and isinstance(row, dict) and "conversations" in row:
        raise _Refused("conversations (ShareGPT)")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _Refused("no messages")
    return row


def _metadata(row: dict) -> tuple[str, int | None, int | None]:
    """(episode_id, step, seed): an empty text and None for what it does not say. Raises _Refused for an odd seed."""
    metadata = row.get("metadata")
    known = row | metadata if isinstance(metadata, dict) else row  # tables have them as columns beside the messages
    episode_id = known.get("episode_id")
    episode_id = str(episode_id) if isinstance(episode_id, (str, int, float)) else ""
    if len(episode_id) > _LONGEST_NAME:
        digest = hashlib.blake2b(episode_id.encode(), digest_size=8).hexdigest()
        episode_id = f"{episode_id[:_LONGEST_NAME]}-{digest}"
    seed, step = _whole(known.get("seed")), _whole(known.get("step"))
    if seed is not None and not 0 <= seed < 2**31:
        raise _Refused("a seed that is no whole number below 2147483648")
    return episode_id, step if step is not None and 0 <= step < 10**9 else None, seed


_LONGEST_NAME = 180


def _whole(value: object) -> int | None:
    """A whole number, as a number or in a text; a table that lacks some has floats. None is missing, -1 is none."""
    if value is None or value == "" or value != value:
        return None
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        return -1
    if number != number:
        return None
    return int(number) if number.is_integer() else -1


def _turns(row: dict) -> list[_Turn]:
    """The decisions of a line, at least one. Raises _Refused where the line as a whole cannot be used."""
    metadata = row.get("metadata")
    model = (metadata if isinstance(metadata, dict) else row).get("model")
    found: list[_Turn] = []
    system: list[_Content] = []
    shown: list[_Content] = []
    for message, content in zip(row["messages"], _contents(row), strict=True):
        role = message.get("role")
        if role in ("system", "developer"):
            system.append(content)
        elif role == "assistant":
            said = None if message.get("content") is None else prompt.said(message)
            called = prompt.in_openai_form(message).get("tool_calls")
            answer = {"role": "assistant", "content": said, "tool_calls": called}
            turn = _Turn((), None, answer, model[:100] if isinstance(model, str) else "")
            try:
                if 0 in (message.get("weight"), message.get("loss")):  # of OpenAI, of ms-swift
                    raise _Refused("weight 0")
                before: list[dict] = [{"role": "system", "content": _system(system)}] if system else []
                user, picture = _user(shown)
                messages: tuple[dict, ...] = (*before, {"role": "user", "content": user})
                found.append(replace(turn, messages=messages, picture=picture))
            except _Refused as refused:
                found.append(replace(turn, refused=str(refused)))
            shown = []
        else:
            shown.append(content)
    if not found:
        unknown = any(content.refused == _UNKNOWN for content in shown)
        raise _Refused(_UNKNOWN if unknown else "no assistant turn")
    return found


@dataclass(frozen=True)
class _Picture:
    """A picture as it stands in the file."""

    value: object = None
    """None: only its place stands there."""


@dataclass(frozen=True)
class _Content:
    """What a message says, text and pictures in order."""

    pieces: tuple[str | _Picture, ...] = ()
    is_text: bool = False
    """It was a text, and not a list of parts."""
    refused: str = ""

    @property
    def places(self) -> int:
        return self.pieces.count(_Picture())

    def with_pictures(self, pictures: Iterator[_Picture]) -> "_Content":
        """With the next of these in each place."""
        return replace(self, pieces=tuple(next(pictures) if piece == _Picture() else piece for piece in self.pieces))


_UNKNOWN = "a role or content of an unknown kind"
_NO_PLACE = "pictures beside the text that do not match their places"
_PLACE = re.compile(r"<image>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>")
_INSIDE = re.compile(r"!\[[^\]\n]*\]\(|<img[\s>]|data:image/[^;,\s]{0,40};base64,")
_VALUES = ("image_url", "image", "source", "url", "data")


def _contents(row: dict) -> list[_Content]:
    """What each message of a line says, with the pictures that stand beside the text in their places.

    Those of a message are its own, those of the line are all turns'; where there's no place at all, the turn (of the
    line: the user's first) begins with them.
    """
    if any(row.get(key) for key in ("videos", "video", "audios", "audio")):
        raise _Refused("videos or audios")
    messages, beside = row["messages"], _beside(row)
    found = [_content(message) for message in messages]
    if not beside:
        return found
    places = sum(content.places for content in found)
    first = next((index for index, message in enumerate(messages) if message.get("role") == "user"), None)
    if not places and first is not None:
        found[first] = replace(found[first], pieces=(*beside, *found[first].pieces))
    elif places != len(beside):
        raise _Refused(_NO_PLACE)
    pictures = iter(beside)
    return [content.with_pictures(pictures) for content in found]


def _beside(holder: dict) -> list[_Picture]:
    """The pictures under `images` or `image` of a line or a message."""
    found = [holder.get("images"), holder.get("image")]
    return [_Picture(one) for value in found for one in (value if isinstance(value, list) else [value]) if one]


def _content(message: dict) -> _Content:
    content, beside = message.get("content"), _beside(message)
    if message.get("role") not in ("system", "developer", "user", "tool", "function"):
        return _Content(refused="" if message.get("role") == "assistant" else _UNKNOWN)
    if not isinstance(content, (str, list)):
        return _Content(refused=_UNKNOWN)
    try:
        pieces = tuple(
            piece for part in ([content] if isinstance(content, str) else content) for piece in _pieces(part)
        )
    except _Refused as refused:
        return _Content(refused=str(refused))
    found = _Content(pieces, isinstance(content, str))
    if beside and not found.places:
        return replace(found, pieces=(*beside, *pieces))
    if beside and found.places != len(beside):
        return _Content(refused=_NO_PLACE)
    return found.with_pictures(iter(beside)) if beside else found


def _pieces(part: object) -> list[str | _Picture]:
    """A part of a message's content, a text with the places in it. Raises _Refused on one of an unknown kind."""
    if isinstance(part, dict) and part.get("type") in ("image_url", "input_image", "image"):
        return [_Picture(next((part[name] for name in _VALUES if part.get(name) is not None), None))]
    if isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text"):
        part = part.get("text")
    if not isinstance(part, str):
        raise _Refused(_UNKNOWN)
    if _INSIDE.search(part):
        raise _Refused("a picture inside the text")
    if "<video>" in part or "<audio>" in part:
        raise _Refused("videos or audios")
    between = _PLACE.split(part)
    pieces = [piece for text in between for piece in (_Picture(), text)][1:]
    return [piece for piece in pieces if piece] if len(between) > 1 else [part]


def _system(contents: list[_Content]) -> str:
    """The system prompt: all that was said in this role until then, since the chat template shows but one turn."""
    pieces = [piece for content in contents for piece in content.pieces]
    if any(content.refused for content in contents) or not all(isinstance(piece, str) for piece in pieces):
        raise _Refused(next((content.refused for content in contents if content.refused), _UNKNOWN))
    return "\n".join("".join(map(str, content.pieces)) for content in contents)


def _user(shown: list[_Content]) -> tuple[str | list[dict], str | None]:
    """What a user's turn says, with {"type": "image"} for the picture, and the picture: a data: URL, or base64."""
    if not shown:
        raise _Refused("nothing shown before the reply")
    for content in shown:
        if content.refused:
            raise _Refused(content.refused)
    pieces = [piece for content in shown for piece in content.pieces]
    pictures = [_address(piece.value) for piece in pieces if isinstance(piece, _Picture)]
    if len(pictures) > 1:
        raise _Refused("several pictures in a turn")
    if len(shown) == 1 and shown[0].is_text and not pictures:
        return "".join(map(str, pieces)), None
    parts = [{"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"} for piece in pieces]
    return parts, pictures[0] if pictures else None


def _address(value: object) -> str:
    """A picture as a data: URL, or in base64. Raises _Refused on a place without one, and on an address."""
    if value is None:
        raise _Refused("a picture's place without the picture")
    if isinstance(value, dict):
        held = [value.get(name) for name in ("url", "bytes", "data", "path")]
        value = next((one for one in held if one is not None), None)
    if not isinstance(value, str):
        raise _Refused("a broken picture")
    if not value.strip() or re.fullmatch(r"data:[^,]*,?\s*", value[:200], re.IGNORECASE):
        raise _Refused("an empty picture URL")
    if not value[:5].lower() == "data:" and not re.fullmatch(r"[A-Za-z0-9+/=\s]+", value[:100]):
        raise _Refused("a picture by address")
    return value


def _parsed(answer: dict, tools: Tools) -> prompt.Parsed:
    """The actions of a reply, with calls of others' tools taken for what they mean."""
    called = answer["tool_calls"]
    if tools and called is None:  # perhaps in the text; unless all can be read, the reply stays as it is
        written = prompt.calls(answer)
        whole = len(written) == (answer["content"] or "").count("<tool_call>")
        called = [{"function": call} for call in written] if whole else None
    if tools and called:
        answer = {"role": "assistant", "tool_calls": [_meant(call, tools) for call in called]}
    return prompt.parse(answer, MOST_ACTIONS)


def _meant(call: object, tools: Tools) -> object:
    """The call of `act` that a call of one of these tools is; any other as it came."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or name not in tools:
        return call
    tool, arguments = tools[name], function.get("arguments")
    if tool.action:
        return {"function": {"name": "act", "arguments": {"actions": [tool.action]}}}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {"function": {"name": "act", "arguments": arguments}}
    asked = arguments.get(tool.argument) if isinstance(arguments, dict) else None
    listed = asked if isinstance(asked, list) else [asked]
    actions = None if asked is None else [tool.names.get(str(one), one) for one in listed]
    return {"function": {"name": "act", "arguments": {"actions": actions}}}


def _step(turn: _Turn, step: int, name: str, tools: Tools) -> Step:
    picture = None if turn.picture is None else _png(turn.picture)
    parsed = _parsed(turn.answer, tools)
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


def _png(picture: str) -> bytes:
    """The picture of a data: URL, or of base64, encoded anew, so that what comes after reads only PNGs of our making.

    As it is looked at: turned as its EXIF data say, transparent parts on white (as Qwen's own tools have it), 16 bits
    of grey as 8.
    """
    try:
        encoded = picture.partition(",")[2] if picture[:5].lower() == "data:" else picture
        data = base64.b64decode("".join(encoded.split()), validate=True)
        # Pillow reads dozens of formats; the fewer decoders meet a stranger's bytes, the better.
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF")) as image:
            if image.width * image.height > LARGEST_PICTURE:
                raise _Refused("a picture over 4 megapixels")
            if max(image.size) > LONGEST_STRIP * min(image.size):
                raise _Refused("a picture more than 200 times as long as wide")
            # An MPO is a photograph with further ones for the camera's own use.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise _Refused("an animated picture")
            return png.encode(np.asarray(_as_seen(image)))
    except _Refused:
        raise
    except Image.DecompressionBombError:
        raise _Refused("a picture over 4 megapixels") from None
    except Exception:  # Pillow's decoders raise whatever they come upon
        raise _Refused("a broken picture") from None


def _as_seen(image: Image.Image) -> Image.Image:
    """8 bits of red, green and blue, the right way up."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        grey = np.asarray(upright)
        see_through = grey == upright.info.get("transparency", -1)
        upright = Image.fromarray(np.where(see_through, 255, grey >> 8).astype(np.uint8))
    elif upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def _why_nothing(report: Report, name: str, path: Path) -> str:
    reasons = report.left_out
    if report.tools:
        tools = ", ".join(f"{tool}: {{}}" for tool in report.tools)
        return (
            f"no reply can be read: they call {', '.join(report.tools)}. Say in params.yaml what that means, as "
            f"imports: {{{name}: {{file: {path}, tools: {{{tools}}}}}}}, if it is our act under another name; "
            "docs/data.md has the rest"
        )
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
    reasons = [f"{count} × {reason}" for reason, count in report.left_out.most_common()]
    unreadable = [f"{count} × {reason}" for reason, count in report.invalid.most_common()]
    tools = f" ({', '.join(report.tools)})" if report.tools else ""
    return "; ".join(
        [
            f"{report.decisions['usable']} usable decisions from {report.lines['read']} lines",
            *([f"{report.pictures['without']} of them without a picture"] if report.pictures["without"] else []),
            *([f"unreadable replies: {', '.join(unreadable)}{tools}"] if unreadable else []),
            *([f"left out: {', '.join(reasons)}"] if reasons else []),
        ]
    )
