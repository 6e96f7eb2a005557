"""What a player is shown is true and complete, and whatever it answers is read or refused, never a crash."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from crafter import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice import prompt
from apprentice.params import Prompt
from apprentice.world import ACTIONS, ITEMS, TILES, VITALS, Observation, World, png


def called(arguments, name="act") -> dict:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def said(content) -> dict:
    return {"role": "assistant", "content": content}


def hermes(*actions: str) -> str:
    return "<tool_call>\n" + json.dumps({"name": "act", "arguments": {"actions": actions}}) + "\n</tool_call>"


@pytest.fixture(scope="module")
def observation() -> Observation:
    return World(0).reset()


def test_the_tool_offers_crafters_17_actions_in_order():
    offered = prompt.TOOLS[0]["function"]["parameters"]["properties"]["actions"]["items"]["enum"]
    assert offered == list(constants.actions)
    assert len(offered) == 17
    json.dumps(prompt.TOOLS)


@pytest.mark.parametrize(
    ("message", "actions"),
    [
        (called('{"actions": ["do"]}'), ("do",)),
        (called({"actions": ["do"]}), ("do",)),
        (called('{"actions": ["move_left", "do", "do"]}'), ("move_left", "do", "do")),
        (said(hermes("sleep")), ("sleep",)),
        (said("I am tired. " + hermes("sleep") + " Good night."), ("sleep",)),
        (said(hermes("move_up") + "\n" + hermes("do", "noop")), ("move_up", "do", "noop")),
        (said(hermes("do").removesuffix("</tool_call>")), ("do",)),
        (said([{"type": "text", "text": "so "}, {"type": "text", "text": hermes("do")}]), ("do",)),
        ({"tool_calls": called('{"actions": ["do"]}')["tool_calls"] * 2}, ("do", "do")),
        (called('{"actions": ["do"]}') | {"content": hermes("noop")}, ("do",)),
    ],
)
def test_a_reply_in_openais_or_hermes_form_is_read(message, actions):
    assert prompt.parse(message) == prompt.Parsed(actions)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (said("I go left."), "no tool call"),
        (said(None), "no tool call"),
        (said(""), "no tool call"),
        (said([]), "no tool call"),
        (said([{"type": "image_url"}, 5]), "no tool call"),
        ({}, "no tool call"),
        ({"tool_calls": []}, "no tool call"),
        (None, "no tool call"),
        ("do", "no tool call"),
        ([], "no tool call"),
        (called('{"actions": ["do"]}', name="run"), "unknown tool 'run'"),
        (called('{"actions": ["do"]}', name=None), "no name"),
        ({"tool_calls": [None]}, "no name"),
        ({"tool_calls": [{"function": "act"}]}, "no name"),
        (called('{"actions": ["fly"]}'), "unknown action 'fly'"),
        (called('{"actions": ["do", "Do"]}'), "unknown action 'Do'"),
        (called('{"actions": [5]}'), "an action that is not a text"),
        (called('{"actions": [["do"]]}'), "an action that is not a text"),
        (called('{"actions": ["do"'), "not valid JSON"),
        (called(""), "not valid JSON"),
        (called("do"), "not valid JSON"),
        (called("[" * 100_000), "not valid JSON"),
        (called("9" * 5000), "not valid JSON"),
        (called('["do"]'), "no list of actions"),
        (called('"do"'), "no list of actions"),
        (called(None), "no list of actions"),
        (called({}), "no list of actions"),
        (called({"actions": []}), "no list of actions"),
        (called({"actions": "do"}), "no list of actions"),
        (called({"action": ["do"]}), "no list of actions"),
        (said("<tool_call>move left</tool_call>"), "not valid JSON"),
        (said("<tool_call>"), "not valid JSON"),
        (said("<tool_call>" + "[" * 100_000), "not valid JSON"),
        (said("<tool_call>[1]</tool_call>"), "no name"),
        (said(hermes("do") + "<tool_call>{</tool_call>"), "not valid JSON"),
    ],
)
def test_a_reply_that_cannot_be_read_has_a_reason_and_no_actions(message, why):
    parsed = prompt.parse(message)
    assert parsed.actions == ()
    assert why in parsed.invalid
    assert len(parsed.invalid) < 100


ARGUMENTS = {"actions": ["do"]}
ELSEWHERE = {
    "an older API's": {"content": None, "function_call": {"name": "act", "arguments": json.dumps(ARGUMENTS)}},
    "bare": {"tool_calls": [{"name": "act", "arguments": ARGUMENTS}]},
    "bare, with text": {"tool_calls": [{"id": "1", "name": "act", "arguments": json.dumps(ARGUMENTS)}]},
    "one instead of a list": {"tool_calls": called(ARGUMENTS)["tool_calls"][0]},
    "Anthropic's part": {
        "content": [{"type": "text", "text": "So."}, {"type": "tool_use", "name": "act", "input": ARGUMENTS}]
    },
    "Gemini's part": {"content": [{"functionCall": {"name": "act", "args": ARGUMENTS}}]},
    "an item of the Responses API": {
        "content": [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": hermes("sleep")}]},
            {"type": "function_call", "call_id": "1", "name": "act", "arguments": json.dumps(ARGUMENTS)},
        ]
    },
    "its output": {"output": [{"type": "function_call", "name": "act", "arguments": json.dumps(ARGUMENTS)}]},
    "custom": {"tool_calls": [{"type": "custom", "custom": {"name": "act", "input": json.dumps(ARGUMENTS)}}]},
}


@pytest.mark.parametrize("form", ELSEWHERE)
def test_a_call_in_another_form_is_the_one_call_that_it_is(form):
    message = {"role": "assistant"} | ELSEWHERE[form]
    plain = prompt.in_openai_form(message)
    assert prompt.parse(message) == prompt.parse(plain) == prompt.Parsed(("do",))
    assert [call["function"]["name"] for call in plain["tool_calls"]] == ["act"]
    assert set(plain) == {"role", "content", "tool_calls"}


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('[TOOL_CALLS][{"name": "act", "arguments": {"actions": ["do"]}}]', "Mistral's"),
        ("<function=act><parameter=actions>do</parameter></function>", "<function=…>"),
        ('<|python_tag|>{"name": "act"}', "Llama's"),
        ("<｜tool▁calls▁begin｜>act", "DeepSeek's"),
        ("<|channel|>commentary to=functions.act", "gpt-oss's"),
    ],
)
def test_a_call_that_the_server_should_have_read_is_refused_by_its_form(text, form):
    parsed = prompt.parse(said(text))
    assert not parsed.actions and parsed.invalid.startswith("no tool call, but ") and form in parsed.invalid


OPENED = ["<think>", "<thinking>", "[THINK]", "<Think>", "<thought>", "<seed:think>", "◁think▷", "<|begin_of_thought|>"]


@pytest.mark.parametrize("opened", OPENED)
def test_what_is_only_thought_is_neither_done_nor_said(opened):
    closed = "<|end_of_thought|>" if "_of_" in opened else f"{opened[0]}/{opened[1:]}"
    thought = f"maybe {hermes('sleep')} or <tool_call>, "
    for text, actions, words in (
        (f"{opened}{thought}{closed}Go. {hermes('do')}", ("do",), "Go. "),
        (f"{thought}{closed}Go. {hermes('do')}", ("do",), "Go. "),  # a template has opened it
        (f"{hermes('sleep')} no{closed}Go. {hermes('do')}", ("do",), "Go. "),
        (f"{opened}{thought}{closed}Go.", (), "Go."),
        (f"{thought}{closed}Go.", (), "Go."),
        (f"{opened}{thought}", (), ""),
        (f"Hm. {opened}{thought}{closed}Go. {opened}{thought}{closed}{hermes('do')}", ("do",), "Hm. Go. "),
    ):
        parts = [{"type": "text", "text": part} for part in re.split(r"(?<=,)", text)]
        for message in (said(text), said(parts)):
            assert prompt.parse(message).actions == actions
            assert prompt.said(message).split("<tool_call>")[0] == words


def test_a_word_about_thinking_after_the_call_takes_nothing_back():
    assert prompt.parse(said(hermes("do") + " (no </think> here)")).actions == ("do",)


def test_a_call_that_is_quoted_beside_another_is_none():
    quoted = f"```\n{hermes('sleep')}\n```\n"
    assert prompt.parse(said(f"{quoted}is how; now: {hermes('do')}")).actions == ("do",)
    assert prompt.parse(said(quoted)).actions == ("sleep",)


WORDS_ONLY = {
    "text": "Wood first.",
    "parts": [{"type": "text", "text": "Wood "}, {"type": "text", "text": "first."}],
    "texts": ["Wood ", "first."],
    "a part": {"type": "text", "text": "Wood first."},
    "of the Responses API": [{"type": "output_text", "text": "Wood first.", "annotations": []}],
    "its message": [
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wood first."}]}
    ],
    "a text with a value": [{"type": "text", "text": {"value": "Wood first."}}],
    "after a thinking part": [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "Wood first."},
    ],
    "after redacted thinking": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "Wood first."}],
    "after reasoning": [{"type": "reasoning_text", "text": "hm"}, {"type": "text", "text": "Wood first."}],
    "after thinking aloud": "<think>hm</think>Wood first.",
}


@pytest.mark.parametrize("how", WORDS_ONLY)
def test_words_are_words_in_whatever_form(how):
    message = called(ARGUMENTS) | {"content": WORDS_ONLY[how], "reasoning_content": "hm"}
    plain = prompt.in_openai_form(message)
    assert prompt.said(message) == prompt.said(plain) == "Wood first."
    assert isinstance(plain["content"], str)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_beside_a_silent_call_is_its_reason_and_beside_nothing_it_is_none(name):
    assert prompt.in_openai_form(called(ARGUMENTS) | {name: "Wood first."})["content"] == "Wood first."
    assert prompt.in_openai_form(said(None) | {name: hermes("do")}) == said(None)
    assert prompt.parse(said(None) | {name: hermes("do")}).invalid == "no tool call"


def test_more_actions_than_allowed_are_refused_as_a_whole():
    message = prompt.answer(["do"] * 3)
    assert prompt.parse(message).actions == ("do",) * 3
    assert prompt.parse(message, max_actions=3).actions == ("do",) * 3
    refused = prompt.parse(message, max_actions=2)
    assert refused.actions == ()
    assert "3 actions" in refused.invalid
    assert "at most 2" in refused.invalid
    twice = {"tool_calls": message["tool_calls"] * 2}
    assert prompt.parse(twice, max_actions=3).invalid


@given(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=25))
def test_what_a_teacher_answers_is_read_back_exactly(actions):
    message = prompt.answer(actions)
    assert prompt.parse(message) == prompt.Parsed(tuple(actions))
    assert prompt.parse(json.loads(json.dumps(message))).actions == tuple(actions)


WORDS = st.sampled_from(["act", "do", "noop", "<tool_call>", "</tool_call>", '{"name": "act"}', "[", "\ud800"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS
KEYS = st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "actions", "text", "x"])
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
CALLS = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": LEAVES, "arguments": ANYTHING})})
ACTS = st.fixed_dictionaries(
    {"name": st.just("act"), "arguments": ANYTHING | st.fixed_dictionaries({"actions": ANYTHING})}
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "content": ANYTHING | st.builds("".join, st.lists(WORDS, max_size=6)) | ACTS.map(json.dumps),
        "tool_calls": ANYTHING
        | st.lists(CALLS | ACTS.map(lambda function: {"function": function}) | ANYTHING, max_size=3),
    },
)


@settings(max_examples=300, deadline=None)
@given(ANYTHING | MESSAGES, st.none() | st.integers(1, 20))
def test_no_message_raises(message, max_actions):
    parsed = prompt.parse(message, max_actions)
    if isinstance(message, dict):
        assert prompt.parse(prompt.in_openai_form(message), max_actions) == parsed
    assert bool(parsed.actions) != bool(parsed.invalid)
    assert set(parsed.actions) <= set(ACTIONS)
    parsed.invalid.encode()  # so that it can be stored


@pytest.mark.parametrize("place", ["action", "arguments", "text", "content", "tool_calls"])
def test_no_nesting_is_too_deep(place):
    deep: list = []
    for _ in range(20_000):
        deep = [deep]
    message = {
        "action": called({"actions": [deep]}),
        "arguments": called(deep),
        "text": said([{"type": "text", "text": deep}]),
        "content": said(deep),
        "tool_calls": {"tool_calls": deep},
    }[place]
    assert prompt.parse(message).invalid


@pytest.mark.parametrize(("kind", "rules"), [("place", constants.place), ("make", constants.make)])
def test_the_system_prompt_states_crafters_real_costs(kind, rules):
    lines = prompt.system(Prompt(rules=True)).splitlines()
    assert rules
    for name, rule in rules.items():
        (line,) = [line for line in lines if line.startswith(f"- {kind}_{name}:")]
        costs, conditions = line.split(": costs ")[1].split("; ")
        found = {item: int(count) for count, item in re.findall(r"(\d+) (\w+)", costs)}
        assert found == rule["uses"]
        needed = rule["where"] if kind == "place" else rule["nearby"]
        assert {word for word in re.findall(r"\w+", conditions) if word in constants.materials} == set(needed)


def test_the_system_prompt_states_what_collecting_needs():
    lines = prompt.system(Prompt(rules=True)).splitlines()
    for material, rule in constants.collect.items():
        (line,) = [line for line in lines if line.startswith(f"- {material}: gives ")]
        for item in rule["require"]:
            assert f"needs {item}" in line
        assert ("needs" in line) == bool(rule["require"])
    assert any("sapling" in line and "10%" in line for line in lines)


def test_the_system_prompt_names_every_action_and_achievement_and_no_placeholder():
    words = prompt.system(Prompt(rules=True))
    for name in (*constants.actions, *constants.achievements):
        assert name in words
    assert not re.search(r"[{}]", words)


def test_the_system_prompt_says_how_many_actions_are_allowed():
    for rules in (True, False):
        assert "one action" in prompt.system(Prompt(rules=rules, max_actions=1))
        assert "1 to 5 actions" in prompt.system(Prompt(rules=rules, max_actions=5))
    assert len(prompt.system(Prompt(rules=False)).splitlines()) == 1


@pytest.mark.parametrize(
    ("mode", "pictures", "words"), [("image", 1, False), ("text", 0, True), ("text+image", 1, True)]
)
def test_a_mode_shows_what_it_says(observation, mode, pictures, words):
    system, user = prompt.messages(observation, Prompt(mode=mode))
    assert (system["role"], user["role"]) == ("system", "user")
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["image_url"] * pictures + ["text"]
    assert ("around you" in user["content"][-1]["text"]) == words
    assert (prompt.grid(observation) in user["content"][-1]["text"]) == words


@pytest.mark.parametrize("scale", [1, 4])
def test_the_picture_shown_is_the_observations_enlarged_exactly(observation, scale):
    _, user = prompt.messages(observation, Prompt(scale=scale))
    head, data = user["content"][0]["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    shown = png.decode(base64.b64decode(data))
    side = len(observation.image)
    assert shown.shape == (scale * side, scale * side, 3)
    for dx in range(scale):
        for dy in range(scale):
            np.testing.assert_array_equal(shown[dy::scale, dx::scale], observation.image)


@pytest.mark.parametrize("scale", [1, 4])
def test_the_world_alone_is_the_pictures_upper_seven_rows_of_cells(observation, scale):
    settings = Prompt(picture="world", scale=scale)
    data = prompt.messages(observation, settings)[1]["content"][0]["image_url"]["url"].split(",")[1]
    shown = png.decode(base64.b64decode(data))
    assert shown.shape == (56 * scale, 72 * scale, 3) == (*prompt.size(settings)[::-1], 3)
    np.testing.assert_array_equal(shown[::scale, ::scale], observation.image[:56])


def test_a_message_with_an_empty_place_says_the_same_words(observation):
    shown, empty = (prompt.messages(observation, Prompt(), inline=inline)[1]["content"] for inline in (True, False))
    assert empty[0] == {"type": "image"}
    assert empty[1:] == shown[1:]


def test_the_same_observation_gives_the_same_message(observation):
    assert prompt.messages(observation, Prompt(scale=2)) == prompt.messages(observation, Prompt(scale=2))


def test_the_grid_names_each_cell_of_the_view_row_by_row():
    view = np.zeros((7, 9), np.uint8)
    view[0, 8], view[6, 0], view[3, 4], view[2, 5] = (TILES.index(n) for n in ("tree", "water", "player", "plant-ripe"))
    rows = [row.split() for row in prompt.grid(replace(World(0).reset(), view=view)).splitlines()]
    assert [len(row) for row in rows] == [9] * 7
    found = {(y, x): word for y, row in enumerate(rows) for x, word in enumerate(row) if word != rows[0][0]}
    assert found == {(0, 8): "tree", (6, 0): "water", (3, 4): "player", (2, 5): "ripe-plant"}


def test_every_tile_is_one_word():
    everything = np.resize(np.arange(len(TILES), dtype=np.uint8), (7, 9))
    rows = prompt.grid(replace(World(0).reset(), view=everything)).splitlines()
    assert [len(row.split()) for row in rows] == [9] * 7


LANDSCAPE = {"grass", "tree", "water", "stone", "sand", "path", "coal"}


@pytest.mark.parametrize(("action", "dx", "dy"), [("move_right", 1, 0), ("move_down", 0, 1), ("move_left", -1, 0)])
def test_walking_shifts_the_grid_the_other_way(action, dx, dy):
    compared = []
    for seed in range(6):
        world = World(seed)
        before = world.reset()
        after = world.step(action).observation
        if after.position != (before.position[0] + dx, before.position[1] + dy):
            continue  # something stood there
        old, new = ([row.split() for row in prompt.grid(seen).splitlines()] for seen in (before, after))
        for y in range(max(0, -dy), 7 - max(0, dy)):
            for x in range(max(0, -dx), 9 - max(0, dx)):
                if {old[y + dy][x + dx], new[y][x]} <= LANDSCAPE:  # creatures walk too
                    assert new[y][x] == old[y + dy][x + dx]
                    compared.append(new[y][x])
    assert len(compared) > 150
    assert compared.count("tree") > 5


def test_the_faced_cell_is_the_one_in_front():
    view = np.full((7, 9), TILES.index("grass"), np.uint8)
    around = {(1, 0): "tree", (-1, 0): "water", (0, 1): "stone", (0, -1): "lava"}
    for (dx, dy), name in around.items():
        view[3 + dy, 4 + dx] = TILES.index(name)
    directions = {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up"}
    for facing, name in around.items():
        seen = replace(World(0).reset(), view=view, facing=facing)
        assert f"facing {directions[facing]}, {name}" in prompt.text(seen, Prompt())


def test_the_inventory_lists_what_is_owned_or_everything(observation):
    seen = replace(observation, inventory=dict.fromkeys(ITEMS, 0) | {"wood": 3, "iron_sword": 1})
    owned, everything = (prompt.text(seen, Prompt(inventory=which)) for which in ("owned", "all"))
    assert "wood 3 iron_sword 1" in owned
    assert {name for name in ITEMS if f"{name} " in owned} == {"wood", "iron_sword"}
    for name, count in seen.inventory.items():
        assert re.search(rf"\b{name} {count}\b", everything)


def test_an_empty_inventory_is_said_too(observation):
    assert "nothing owned" in prompt.text(replace(observation, inventory=dict.fromkeys(ITEMS, 0)), Prompt())


def test_vitals_sleep_and_position_are_as_observed(observation):
    seen = replace(observation, vitals=dict(zip(VITALS, (1, 2, 3, 4), strict=True)), sleeping=True, position=(7, 50))
    words = prompt.text(seen, Prompt(position=True))
    assert "health 1 food 2 drink 3 energy 4" in words
    assert "asleep" in words
    assert "at 7 50" in words
    assert "at 7 50" not in prompt.text(seen, Prompt())
    assert "awake" in prompt.text(replace(seen, sleeping=False), Prompt())


def test_history_shows_the_last_actions_in_a_constant_number_of_words(observation):
    played = ("noop", "sleep", "do", "move_left")
    texts = [prompt.text(observation, Prompt(history=3), played[:count]) for count in range(5)]
    assert "last sleep do move_left" in texts[4]
    assert "last nothing nothing noop" in texts[1]
    assert "last nothing nothing nothing" in texts[0]
    assert len({len(text.split()) for text in texts}) == 1
    assert "last" not in prompt.text(observation, Prompt(history=0), played)
