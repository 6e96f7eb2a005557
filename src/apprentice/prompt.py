"""The one place that renders what a player is shown and reads what it answers."""

import base64
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from apprentice.episode import Given
from apprentice.params import Prompt
from apprentice.world import png
from apprentice.world.observation import ACTIONS, SIZE, TILES, VIEW, Observation, constants

TOOLS: list[dict] = [
    {
        "type": "function",
        "function": {
            "name": "act",
            "description": "Act in the world.",
            "parameters": {
                "type": "object",
                "properties": {
                    "actions": {
                        "type": "array",
                        "items": {"type": "string", "enum": list(ACTIONS)},
                        "minItems": 1,
                        "description": "The actions to take, in order.",
                    }
                },
                "required": ["actions"],
            },
        },
    }
]
"""The tool in OpenAI's form, the same for every player; how many actions are allowed is in the system prompt."""

_DIRECTIONS = {(-1, 0): "left", (1, 0): "right", (0, -1): "up", (0, 1): "down"}
_NOT_SHOWN = {"arrow-left": "arrow", "arrow-right": "arrow", "arrow-up": "arrow", "arrow-down": "arrow"}
_NAMES = {"plant": "sapling", "plant-ripe": "ripe-plant", "void": "nothing"}


@dataclass(frozen=True)
class Parsed:
    """A reply that was read: either actions, or why there are none."""

    actions: tuple[str, ...]
    invalid: str = ""
    """The reason, in a few words; empty if the reply is valid."""


def messages(
    observation: Observation, settings: Prompt, history: tuple[str, ...] = (), inline: bool = True
) -> list[dict]:
    """What the player is shown, as OpenAI chat messages: system and user, the picture as a PNG data URL.

    history: the actions executed before; the settings say how many of them are shown.
    inline: False leaves the picture's place empty, for who takes it from `picture`.
    """
    content: list[dict] = []
    if settings.mode != "text":
        image = {"type": "image"}
        if inline:
            image = _inline(shown_png(observation, settings))
        content.append(image)
    content.append({"type": "text", "text": text(observation, settings, history)})
    return [{"role": "system", "content": system(settings)}, {"role": "user", "content": content}]


def given(shown: Given) -> list[dict]:
    """What an imported decision was shown, as it came: whatever the settings, there is nothing to render it from."""
    return [
        message
        if isinstance(message["content"], str)
        else message
        | {"content": [_inline(shown.png) if part["type"] == "image" else part for part in message["content"]]}
        for message in shown.messages
    ]


def _inline(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def answer(actions: tuple[str, ...] | list[str], words: str | None = None) -> dict:
    """The assistant message that asks for these actions: what a teacher says and a student learns to say.

    words: what it says beside its tool call, its reason for one.
    """
    arguments = json.dumps({"actions": list(actions)})
    call = {"id": "call_0", "type": "function", "function": {"name": "act", "arguments": arguments}}
    return {"role": "assistant", "content": words, "tool_calls": [call]}


_THOUGHT = re.compile(
    r"[<\[◁](?P<close>/)?(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)[>\]▷]|<\|(?:begin|(?P<end>end))_of_thought\|>",
    re.IGNORECASE,
)
"""Where a model's thinking begins and ends, in the text of one that thinks aloud."""
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_WRAPPERS = ("function", "function_call", "functionCall", "custom")
_ARGUMENTS = ("arguments", "input", "args", "parameters")
_FOREIGN = {
    "Mistral's [TOOL_CALLS]": r"\[TOOL_CALLS\]",
    "DeepSeek's <｜tool▁calls▁begin｜>": r"tool▁call",
    "Llama's <|python_tag|>": r"<\|python_tag\|>",
    "<function=…>": r"<function=",
    "gpt-oss's <|channel|>": r"<\|channel\|>",
    "<|tool_call|>": r"<\|tool_call",
    "Anthropic's <invoke>": r"<(?:antml:)?invoke ",
}
"""Calls that a model wrote into its text and its server has not read: the form, and what it is known by."""
_BROKEN = object()
"""In the place of a call, or of its arguments, that should be JSON and isn't."""


def said(message: dict) -> str:
    """The text of a chat message, of all its parts one after the other, without thinking; empty where there is none."""
    return _spoken(_words(message.get("content"))) if isinstance(message, dict) else ""


def said_beside_calls(message: dict) -> str:
    """The same without the calls that stand in it as text."""
    return _BLOCK.sub("", said(message)).strip()


def _words(content: object, depth: int = 4) -> str:
    """The text of a content in any of the forms that endpoints give it: a text, a part, a list of either."""
    if isinstance(content, str):
        return content
    if not depth:
        return ""
    if isinstance(content, list):
        return "".join(_words(part, depth - 1) for part in content)
    if not isinstance(content, dict) or re.search("think|reason|summary", str(content.get("type", ""))[:40]):
        return ""
    within = (content.get(name) for name in ("text", "content", "parts", "value"))
    return next((text for part in within if (text := _words(part, depth - 1))), "")


def _spoken(text: str) -> str:
    """A text without what is thought: from a <think> to its end, or from the start where a template has opened it."""
    spoken, at, thinking = "", 0, False
    for tag in _THOUGHT.finditer(text):
        ends = bool(tag["close"] or tag["end"])
        if not thinking:
            spoken += text[at : tag.start()]
        # A reply that begins with a call isn't thought, and may speak of the tag; unless another call follows.
        if ends and not thinking and ("<tool_call>" in text[tag.end() :] or not spoken.lstrip().startswith("<tool")):
            spoken = ""
        at, thinking = tag.end(), not ends
    return spoken if thinking else spoken + text[at:]


def in_openai_form(message: dict) -> dict:
    """An assistant's message in OpenAI's own form, whatever form it came in; `parse` reads the same in both.

    Where there is a call and nothing is said beside it, what the endpoint gives as its reasoning stands there.
    """
    content = message.get("content")
    text = content if isinstance(content, str) else _words(content) or None
    called = [_openai(call, number) for number, call in enumerate(_raw_calls(message))]
    if called and not said({"content": text}):
        text = _words(message.get("reasoning_content")) or _words(message.get("reasoning")) or text
    refusal = {"refusal": message["refusal"]} if message.get("refusal") else {}
    return {"role": "assistant", "content": text} | ({"tool_calls": called} if called else {}) | refusal


def calls(message: dict) -> list[dict]:
    """The tool calls of an assistant message that have a name and arguments in JSON: {"name", "arguments"}."""
    found = [call for call in _calls(message) if isinstance(call, dict) and isinstance(call["name"], str)]
    return [call for call in found if call["arguments"] is not _BROKEN]


def _calls(message: object) -> list:
    """All tool calls; _BROKEN for one that is no JSON, None for one that is no object."""
    if not isinstance(message, dict):
        return []
    if raw := _raw_calls(message):
        return [_call(call) for call in raw]
    text = said(message)
    blocks = _BLOCK.findall(_FENCED.sub("", text)) or _BLOCK.findall(text)
    return [_BROKEN if (block := _json(text)) is _BROKEN else _call(block) for text in blocks]


def _raw_calls(message: dict) -> list:
    """The calls beside the text, in the form they came in: OpenAI's, a single one, its older API's, parts of others."""
    found = message.get("tool_calls") or message.get("function_call")
    if found and isinstance(found, (list, dict)):
        return found if isinstance(found, list) else [found]
    contents = [message.get(name) for name in ("content", "output")]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    kinds = ("tool_use", "tool_call", "function_call")
    return [
        part
        for part in parts
        if isinstance(part, dict) and (part.get("type") in kinds or isinstance(part.get("functionCall"), dict))
    ]


def _call(call: object) -> dict | None:
    """A call as {"name", "arguments"}, whatever it is wrapped in."""
    if not isinstance(call, dict):
        return None
    function = next((call[name] for name in _WRAPPERS if isinstance(call.get(name), dict)), call)
    arguments = next((function[name] for name in _ARGUMENTS if name in function), None)
    return {"name": function.get("name"), "arguments": _json(arguments) if isinstance(arguments, str) else arguments}


def _openai(call: object, number: int) -> object:
    """A call in OpenAI's form; one that has no name as it came."""
    found = _call(call)
    if found is None or not isinstance(call, dict) or isinstance(call.get("function"), dict):
        return call
    if not isinstance(found["name"], str):
        return call
    arguments = "" if found["arguments"] is _BROKEN else json.dumps(found["arguments"])
    function = {"name": found["name"], "arguments": arguments}
    return {"id": call.get("id") or f"call_{number}", "type": "function", "function": function}


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _BROKEN


def spoken(message: dict) -> str:
    """An assistant message as the student says it: its words, then its calls in Hermes blocks."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    asked = [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls]
    blocks = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in asked]
    return "\n".join([text for text in (said(message), *blocks) if text])


_SPECIAL = re.compile(r"<(?=\|\w+\|>)")


def plain(messages: list[dict]) -> list[dict]:
    """Chat messages that spell no special token, in no role, nor in a call's name or arguments.

    A tokenizer takes `<|im_end|>` for the end of a turn and `<|image_pad|>` for a picture, whoever wrote it. Here it
    becomes `< |im_end|>`, which is plain letters to every tokenizer. Messages without any are returned as they are.
    """
    return [_plain(_in_one(message) if _SPECIAL.search(said(message)) else message) for message in messages]


def _in_one(message: dict) -> dict:
    """The message with texts that follow each other as one: together they may spell what none spells alone."""
    parts: list[dict] = []
    for part in message["content"] if isinstance(message["content"], list) else ():
        if parts and part.get("type") == parts[-1].get("type") == "text":
            parts[-1] = parts[-1] | {"text": parts[-1]["text"] + part["text"]}
        else:
            parts.append(part)
    return message | {"content": parts or message["content"]}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _SPECIAL.sub("< ", value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {_plain(key): _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def parse(message: dict, max_actions: int | None = None) -> Parsed:
    """The actions that an assistant message asks for, or why it cannot be read; never raises on a message.

    Read are tool calls as OpenAI has them (arguments as JSON text or as a dict) and as others do: bare, a single one,
    of older and newer APIs, among the parts of the content; and Hermes `<tool_call>` blocks in the text. A call that
    was only thought is none, nor is one in a code fence beside others. Several calls are taken one after the other.
    max_actions: the most that are allowed; None for any number.
    """
    found = _calls(message)
    if not found:
        text = said(message)
        forms = [form for form, known in _FOREIGN.items() if re.search(known, text)]
        return Parsed((), f"no tool call, but {forms[0]} in the text" if forms else "no tool call")
    if _BROKEN in found:
        return Parsed((), "the tool call is not valid JSON")
    actions: list[str] = []
    for call in found:
        if call is None or not isinstance(call["name"], str):
            return Parsed((), "the tool call has no name")
        if call["name"] != "act":
            return Parsed((), f"unknown tool {call['name'][:40]!r}")
        arguments = call["arguments"]
        if arguments is _BROKEN:
            return Parsed((), "the arguments are not valid JSON")
        asked = arguments.get("actions") if isinstance(arguments, dict) else None
        if not isinstance(asked, list) or not asked:
            return Parsed((), "the arguments have no list of actions")
        for action in asked:
            if not isinstance(action, str):
                return Parsed((), "an action that is not a text")
            if action not in ACTIONS:
                return Parsed((), f"unknown action {action[:40]!r}")
        actions += asked
    if max_actions is not None and len(actions) > max_actions:
        return Parsed((), f"{len(actions)} actions asked for, at most {max_actions} allowed")
    return Parsed(tuple(actions))


def size(settings: Prompt) -> tuple[int, int]:
    """Width and height of the picture that the player is shown, in pixels."""
    height = SIZE * VIEW[1] // VIEW[0] if settings.picture == "world" else SIZE
    return SIZE * settings.scale, height * settings.scale


def picture(observation: Observation, settings: Prompt) -> np.ndarray:
    """The picture that the player is shown: uint8 (height, width, 3), enlarged without smoothing."""
    image = observation.image[: size(settings)[1] // settings.scale]
    if settings.scale > 1:
        image = image.repeat(settings.scale, axis=0).repeat(settings.scale, axis=1)
    return image


def pictures(observation: Observation, settings: Prompt) -> list[np.ndarray]:
    """What goes with `messages` that aren't inline: the picture, or none in a mode without."""
    return [picture(observation, settings)] if settings.mode != "text" else []


def shown_png(observation: Observation, settings: Prompt) -> bytes:
    """The picture that the player is shown, as PNG."""
    if settings.scale > 1 or settings.picture != "whole":
        return png.encode(picture(observation, settings))
    if observation.png is None:
        object.__setattr__(observation, "png", png.encode(observation.image))  # the record needs it once more
    return observation.png


def text(observation: Observation, settings: Prompt, history: tuple[str, ...] = ()) -> str:
    """The words of the user's turn: status, inventory, facing, and what else the settings ask for."""
    owned = {name: count for name, count in observation.inventory.items() if count or settings.inventory == "all"}
    state = "asleep" if observation.sleeping else "awake"
    lines = [
        " ".join(f"{name} {value}" for name, value in observation.vitals.items()),
        " ".join(f"{name} {count}" for name, count in owned.items()) or "nothing owned",
        f"{state}, facing {_DIRECTIONS[observation.facing]}, {ahead(observation)}",
    ]
    if settings.position:
        lines.append("at {} {}".format(*observation.position))
    if settings.history:
        shown = (("nothing",) * settings.history + history)[-settings.history :]
        lines.append("last " + " ".join(shown))
    if settings.mode != "image":
        lines.append(surroundings(observation))
    return "\n".join(lines)


def ahead(observation: Observation) -> str:
    """What is in the cell that the player faces."""
    (dx, dy), (columns, rows) = observation.facing, VIEW
    return _name(TILES[observation.view[rows // 2 + dy, columns // 2 + dx]])


def surroundings(observation: Observation) -> str:
    """The 9 × 7 cells around the player in words, row by row as in the picture."""
    return f"around you, {VIEW[1]} rows from top to bottom, {VIEW[0]} cells each:\n{grid(observation)}"


def grid(observation: Observation) -> str:
    """Seven lines of nine words."""
    return "\n".join(" ".join(_name(TILES[code]) for code in row) for row in observation.view)


def _name(tile: str) -> str:
    return _NAMES.get(tile, _NOT_SHOWN.get(tile, tile))


@lru_cache
def system(settings: Prompt) -> str:
    """The system prompt. Every number in it is read from Crafter's own rules."""
    count = "one action" if settings.max_actions == 1 else f"1 to {settings.max_actions} actions, carried out in order"
    if not settings.rules:
        return f"Play Crafter. Call act with {count}."
    return _RULES.format(
        count=count,
        actions=", ".join(ACTIONS),
        place="\n".join(
            f"- place_{name}: costs {_cost(rule['uses'])}; onto {', '.join(rule['where'])}"
            for name, rule in constants.place.items()
        ),
        make="\n".join(
            f"- make_{name}: costs {_cost(rule['uses'])}; within one cell of a {' and a '.join(rule['nearby'])}"
            for name, rule in constants.make.items()
        ),
        collect="\n".join(
            f"- {material}: gives {_cost(rule['receive'])}"
            + (f", needs {' and '.join(rule['require'])}" if rule["require"] else "")
            + (f", works {rule['probability']:.0%} of the time" if "probability" in rule else "")
            for material, rule in constants.collect.items()
        ),
        achievements=", ".join(constants.achievements),
    )


def _cost(items: dict[str, int]) -> str:
    return " and ".join(f"{count} {name}" for name, count in items.items())


_RULES = """\
You play Crafter, a survival game on a 64 × 64 map seen from above. You see the 9 × 7 cells around you; you are in \
the middle of them. The two lowest rows of the picture show your vitals and inventory. Unlock as many different \
achievements as you can before you die.

At each turn call the tool act with {count}. The actions: {actions}.
- move_* turns you to that direction and takes one step if the cell is free (grass, sand, path). Never walk into lava.
- do acts on the one cell you face: collects material, drinks water, attacks a creature, eats a cow or a ripe plant.
- sleep restores energy until you wake up; creatures hurt a sleeper badly, so wall yourself in with stones first.

Collect with do:
{collect}
Place in front of you:
{place}
Make:
{make}

Vitals go from 0 to 9. Food, drink and energy fall slowly; at 0 they cost health. Eat cows or ripe plants, drink \
water, sleep when tired. Zombies live on grass, skeletons in caves; hit them until they fall.

An order that works: collect saplings from grass and place one; collect wood; place a table; next to it make a wood \
pickaxe and a wood sword; collect stone; make a stone pickaxe and a stone sword; place a stone; collect coal; place a \
furnace near the table; collect iron; make an iron pickaxe and an iron sword; collect a diamond. On the way drink, \
eat, fight and sleep.

The achievements: {achievements}."""
