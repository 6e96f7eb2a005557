"""Chats of others become one more trace: what we export comes back as it was, and rubbish is counted, never a crash."""

import base64
import io
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from apprentice import params, prompt, store
from apprentice.data import chat_rows, imports
from apprentice.data.filters import Funnel, select
from apprentice.data.imports import NothingUsable, Report, read
from apprentice.episode import Episode, Given, Reply, Step
from apprentice.params import Filter, Prompt, Tool
from apprentice.pipeline import ROOT
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.student import encoding
from apprentice.world import ACTIONS, png

SHOWN = Prompt(mode="text+image", history=2)
yaml = YAML(typ="safe")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """What `split` exports of three episodes."""
    episodes = play(Scripted("expert"), Spec(range(3), 40, SHOWN))
    return [chat_rows.row(episode, step, SHOWN) for episode in episodes for step in episode.steps]


def url(width: int = 8, height: int = 8, form: str = "png") -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)).save(buffer, format=form)
    return f"data:image/{form};base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(address: object) -> dict:
    return {"type": "image_url", "image_url": {"url": address}}


def user(*parts: dict | str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


NOOP = prompt.answer(["noop"])
GOOD = {"messages": [user("grass", picture(url())), NOOP]}


def write(path: Path, *lines: object) -> Path:
    """bytes as they are, the rest as JSON."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def imported(path: Path, **settings):
    report = Report()
    return list(read(path, "friends", report, **settings)), report


def test_what_we_export_comes_back_as_it_was_and_in_order(rows, tmp_path):
    """Through the trace, the filter and the file between them, from shuffled lines."""
    shuffled = random.Random(0).sample(rows, len(rows))
    episodes, report = imported(write(tmp_path / "rows.jsonl", *shuffled))
    store.write(tmp_path / "trace.parquet", episodes)
    kept = list(select(store.read(tmp_path / "trace.parquet"), Filter(deduplicate=False), Funnel()))
    assert report.lines == {"read": len(rows)}
    assert report.decisions == {"read": len(rows), "usable": len(rows)}
    again = [chat_rows.row(episode, step, Prompt()) for episode in kept for step in episode.steps]

    def place(row):
        return row["metadata"]["seed"], row["metadata"]["step"]

    again.sort(key=place)
    for before, after in zip(sorted(rows, key=place), again, strict=True):
        assert after["messages"] == before["messages"]
        assert after["tools"] == before["tools"]
        name = {"episode_id": f"friends-{before['metadata']['episode_id']}", "teacher": "friends"}
        assert after["metadata"] == before["metadata"] | name
    assert all([step.step for step in e.steps] == sorted(step.step for step in e.steps) for e in kept)
    assert [episode.seed for episode in store.read(tmp_path / "trace.parquet")] == [episode.seed for episode in kept]


def test_the_same_file_gives_the_same_bytes(rows, tmp_path):
    files = []
    for name in ("one", "two"):
        store.write(tmp_path / name, imported(write(tmp_path / "rows.jsonl", *rows[:50]))[0])
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_of_an_imported_decision_nothing_is_made_up(tmp_path):
    store.write(tmp_path / "trace.parquet", imported(write(tmp_path / "rows.jsonl", GOOD))[0])
    (row,) = store.pq.read_table(tmp_path / "trace.parquet").to_pylist()
    for name in (
        "seed",
        "view",
        "vitals",
        "inventory",
        "facing",
        "position",
        "reward",
        "unlocked",
        "done",
        "died",
        "ending",
    ):
        assert row[name] is None, name


def test_every_assistant_turn_of_a_long_chat_is_a_decision_shown_what_came_right_before_it(tmp_path):
    result = {"role": "tool", "tool_call_id": "call_0", "content": "you moved"}
    hermes = '<tool_call>{"name": "act", "arguments": {"actions": ["do", "do"]}}</tool_call>'
    chat = [
        {"role": "developer", "content": "Play."},
        user("one", picture(url())),
        prompt.answer(["move_left"]),
        result,
        user("two", picture(url(16, 16, "jpeg"))),
        {"role": "assistant", "content": hermes},
        {"role": "user", "content": "three"},
        prompt.answer(["sleep"]),
    ]
    episodes, report = imported(write(tmp_path / "rows.jsonl", {"messages": chat}))
    assert report.decisions == {"read": 3, "usable": 3}
    (episode,) = episodes
    system, image = {"role": "system", "content": "Play."}, {"type": "image"}
    texts = [{"type": "text", "text": text} for text in ("one", "you moved", "two")]
    assert [step.observation.messages for step in episode.steps] == [
        (system, {"role": "user", "content": [texts[0], image]}),
        (system, {"role": "user", "content": [texts[1], texts[2], image]}),
        (system, {"role": "user", "content": "three"}),
    ]
    assert [step.asked for step in episode.steps] == [("move_left",), ("do", "do"), ("sleep",)]
    assert [step.step for step in episode.steps] == [0, 1, 3]
    assert png.decode(episode.steps[1].observation.png).shape == (16, 16, 3)


def test_what_was_said_before_a_call_is_its_reason_however_it_was_written(tmp_path):
    said, call = "Wood first.", '<tool_call>{"name": "act", "arguments": {"actions": ["noop"]}}</tool_call>'
    replies = [
        {"role": "assistant", "content": f"{said} {call}"},
        {"role": "assistant", "content": [{"type": "text", "text": said}], "tool_calls": NOOP["tool_calls"]},
        NOOP,
    ]
    lines = [{"messages": [user("look"), reply]} for reply in replies]
    store.write(tmp_path / "trace.parquet", imported(write(tmp_path / "rows.jsonl", *lines))[0])
    episodes = list(store.read(tmp_path / "trace.parquet"))
    answers = [chat_rows.row(e, step, SHOWN, True)["messages"][-1] for e in episodes for step in e.steps]
    assert answers == [prompt.answer(["noop"], said)] * 2 + [NOOP]


def test_pictures_are_encoded_anew(tmp_path):
    """So that nothing of a stranger's file but its pixels gets into ours."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (10, 20, 30)).save(buffer, format="png", pnginfo=_secret())
    line = {"messages": [user(picture("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())), NOOP]}
    assert b"smuggled" in buffer.getvalue()
    data = imported(write(tmp_path / "rows.jsonl", line))[0][0].steps[0].observation.png
    assert b"smuggled" not in data
    assert (png.decode(data) == (10, 20, 30)).all()


def _secret():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "smuggled")
    return info


def bomb(side: int) -> str:
    """A PNG of a few bytes that says it has so many pixels: 2.7 GB decoded, if 30,000 a side."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def shown(part: dict) -> dict:
    return {"messages": [user("look", part), NOOP]}


def tool(content: object) -> dict:
    return {"role": "tool", "tool_call_id": "call_0", "content": content}


def animated(form: str) -> str:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    return f"data:image/{form};base64," + base64.b64encode(buffer.getvalue()).decode()


KEPT = "played on a world kept for evaluation"
ODD_SEED = "a seed that is no whole number below 2147483648"
NO_PLACE = "pictures beside the text that do not match their places"
NO_PICTURE = "a picture's place without the picture"
LINES = [
    (b"not json", "not JSON"),
    (b'{"messages": ' + b"[" * 100_000, "not JSON"),
    (b"\xff\xfe\x00", "not valid Unicode"),
    ({"messages": [{"role": "user", "content": "\ud800"}, NOOP]}, "not valid Unicode"),
    ([1], "no messages"),
    ({"messages": "hello"}, "no messages"),
    ({"messages": [None]}, "no messages"),
    ({"messages": []}, "no assistant turn"),
    ({"messages": [user("look")]}, "no assistant turn"),
    ({"messages": [{"role": "tool_call", "content": "{}"}]}, "a role or content of an unknown kind"),
    ({"conversations": [{"from": "human", "value": "look"}]}, "conversations (ShareGPT)"),
    (GOOD | {"videos": ["a.mp4"]}, "videos or audios"),
    ({"messages": [user("<image> <image>"), NOOP], "images": [url()]}, NO_PLACE),
    ({"messages": [user("<image>"), NOOP], "images": [url(), url()]}, NO_PLACE),
    *((GOOD | {"metadata": {"seed": seed}}, KEPT) for seed in (200_000, "200000", "200000.0", 200_000.0, " 200000 ")),
    (GOOD | {"seed": 200_000}, KEPT),
    *((GOOD | {"metadata": {"seed": seed}}, ODD_SEED) for seed in (1.5, -1, 2**31, "seven", True, [7], 1e999)),
]
DECISIONS = [
    ({"messages": [{"role": "wizard", "content": "?"}, NOOP]}, "a role or content of an unknown kind"),
    ({"messages": [NOOP]}, "nothing shown before the reply"),
    ({"messages": [{"role": "user", "content": None}, NOOP]}, "a role or content of an unknown kind"),
    (shown({"type": "input_audio", "input_audio": {}}), "a role or content of an unknown kind"),
    (shown(picture("http://127.0.0.1:9/picture.png")), "a picture by address"),
    (shown(picture("file:///etc/hostname")), "a picture by address"),
    (shown(picture(None)), "a broken picture"),
    (shown(picture("data:image/png;base64,////")), "a broken picture"),
    (shown(picture("data:image/png;base64,not base64!")), "a broken picture"),
    (shown(picture(url()[:-40])), "a broken picture"),
    (shown(picture(bomb(2049))), "a picture over 4 megapixels"),
    (shown(picture(url(201, 1))), "a picture more than 200 times as long as wide"),
    (shown(picture(url(2, 402))), "a picture more than 200 times as long as wide"),
    (shown(picture(animated("gif"))), "an animated picture"),
    (shown(picture(animated("png"))), "an animated picture"),
    (shown(picture(animated("webp"))), "an animated picture"),
    (shown({"type": "image", "image": "pictures/0.png"}), "a picture by address"),
    (shown({"type": "image", "image": {"path": "pictures/0.png", "bytes": None}}), "a picture by address"),
    *((shown(picture(empty)), "an empty picture URL") for empty in ("", " ", "data:image/png;base64,", "data:")),
    (shown({"type": "image_url", "image_url": ""}), "an empty picture URL"),
    (shown({"type": "image"}), NO_PICTURE),
    ({"messages": [{"role": "user", "content": "<image>\nlook"}, NOOP]}, NO_PICTURE),
    ({"messages": [user("<|vision_start|><|image_pad|><|vision_end|>look"), NOOP]}, NO_PICTURE),
    ({"messages": [user("<video>look"), NOOP]}, "videos or audios"),
    ({"messages": [user(f"look ![]({url()})"), NOOP]}, "a picture inside the text"),
    ({"messages": [user('look <img src="a.png">'), NOOP]}, "a picture inside the text"),
    ({"messages": [user(f"look {url()}"), NOOP]}, "a picture inside the text"),
    ({"messages": [user("<image><image>") | {"images": [url()]}, NOOP]}, NO_PLACE),
    ({"messages": [tool(None), NOOP]}, "a role or content of an unknown kind"),
    ({"messages": [tool({"moved": True}), NOOP]}, "a role or content of an unknown kind"),
    ({"messages": [tool([picture("http://x/y.png")]), NOOP]}, "a picture by address"),
    ({"messages": [user("look"), NOOP | {"loss": False}]}, "weight 0"),
    (shown(picture(bomb(30_000))), "a picture over 4 megapixels"),
    ({"messages": [user(picture(url()), picture(url())), NOOP]}, "several pictures in a turn"),
    ({"messages": [user("look"), NOOP | {"weight": 0}]}, "weight 0"),
]
REPLIES = [
    ({"role": "assistant", "content": "I go left"}, "no tool call"),
    (prompt.answer(["fly"]), "unknown action"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "interact", "arguments": "{}"}}]}, "unknown tool"),
    (prompt.answer(["noop"] * 21), "actions asked for, at most 20 allowed"),
]


@pytest.mark.parametrize(("line", "reason"), LINES, ids=range(len(LINES)))
def test_a_line_that_cannot_be_used_is_counted_with_its_reason(tmp_path, line, reason):
    episodes, report = imported(write(tmp_path / "rows.jsonl", line, b"", GOOD), held_out=[200_000])
    assert report.lines == {"read": 2, reason: 1}
    assert report.decisions == {"read": 1, "usable": 1}
    assert len(episodes) == 1


@pytest.mark.parametrize(("line", "reason"), DECISIONS, ids=range(len(DECISIONS)))
def test_a_decision_that_cannot_be_used_is_counted_and_the_rest_of_the_chat_is_kept(tmp_path, line, reason):
    more = {"messages": [*line["messages"], user("then"), NOOP]}
    episodes, report = imported(write(tmp_path / "rows.jsonl", more))
    assert report.decisions == {"read": 2, reason: 1, "usable": 1}
    assert [step.observation.messages[-1] for step in episodes[0].steps] == [user("then")]


def test_a_decision_under_an_odd_system_prompt_falls_alone(tmp_path):
    odd = [{"role": "system", "content": [picture(url())]}, user("then"), NOOP]
    episodes, report = imported(write(tmp_path / "rows.jsonl", {"messages": [*GOOD["messages"], *odd]}))
    assert report.decisions == {"read": 2, "a role or content of an unknown kind": 1, "usable": 1}
    assert episodes[0].steps[0].observation.messages == (user("grass", {"type": "image"}),)


def test_system_prompts_are_one_since_the_template_shows_no_second(tmp_path):
    system = [
        {"role": "system", "content": "Play."},
        {"role": "developer", "content": [{"type": "text", "text": "Well."}]},
    ]
    (episode,), _ = imported(write(tmp_path / "rows.jsonl", {"messages": [*system, user("look"), NOOP]}))
    assert episode.steps[0].observation.messages[0] == {"role": "system", "content": "Play.\nWell."}


LOOK, THEN = {"type": "text", "text": "look"}, {"type": "text", "text": "then"}
PLACE = {"type": "image"}
RAW = url().partition(",")[2]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ({"messages": [user("<image>look"), NOOP], "images": [url()]}, [[PLACE, LOOK]]),
        ({"messages": [{"role": "user", "content": "look<image>then"}, NOOP], "image": url()}, [[LOOK, PLACE, THEN]]),
        ({"messages": [{"role": "user", "content": "look"}, NOOP], "images": [RAW]}, [[PLACE, LOOK]]),
        ({"messages": [user(PLACE, "look"), NOOP], "images": [{"bytes": RAW, "path": None}]}, [[PLACE, LOOK]]),
        (
            {
                "messages": [user("<image>look"), NOOP, user("then"), NOOP, user("<image>"), NOOP],
                "images": [url(), url()],
            },
            [[PLACE, LOOK], [THEN], [PLACE]],
        ),
        ({"messages": [{"role": "user", "content": "look", "images": [RAW]}, NOOP]}, [[PLACE, LOOK]]),
        ({"messages": [user("<image>look") | {"images": [url()]}, NOOP]}, [[PLACE, LOOK]]),
        ({"messages": [user({"type": "image", "image": url()}, "look"), NOOP]}, [[PLACE, LOOK]]),
        ({"messages": [user({"type": "input_image", "image_url": url()}, "look"), NOOP]}, [[PLACE, LOOK]]),
        ({"messages": [user(picture(url().replace("data:", "DATA:")), "look"), NOOP]}, [[PLACE, LOOK]]),
        ({"messages": [user({"type": "image_url", "image_url": url(), "text": None}, "look"), NOOP]}, [[PLACE, LOOK]]),
        (
            {"messages": [user({"type": "image", "source": {"type": "base64", "data": RAW}}, "look"), NOOP]},
            [[PLACE, LOOK]],
        ),
        ({"messages": [user("look"), NOOP, tool([THEN, picture(url())]), NOOP]}, [[LOOK], [THEN, PLACE]]),
        ({"messages": [user("look"), NOOP, tool([{"type": "input_text", "text": "then"}]), NOOP]}, [[LOOK], [THEN]]),
        ({"messages": [{"role": "user", "content": ["look", picture(url())]}, NOOP]}, [[LOOK, PLACE]]),
        (
            {"messages": [user("<|vision_start|><|image_pad|><|vision_end|>", "look"), NOOP], "images": [url()]},
            [[PLACE, LOOK]],
        ),
    ],
)
def test_a_picture_is_shown_where_it_belongs_however_it_stands_in_the_file(tmp_path, line, shown):
    (episode,), report = imported(write(tmp_path / "rows.jsonl", line))
    assert report.left_out == {}
    assert [step.observation.messages[-1]["content"] for step in episode.steps] == shown
    expected = png.decode(base64.b64decode(RAW))
    for step, parts in zip(episode.steps, shown, strict=True):
        assert (step.observation.png is not None) == (PLACE in parts)
        if step.observation.png:
            assert (png.decode(step.observation.png) == expected).all()


def saved(image: Image.Image, form: str = "png", **how) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return f"data:image/{form};base64," + base64.b64encode(buffer.getvalue()).decode()


def pixels(values: list) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint8))


def _upside_down() -> str:
    exif = Image.Exif()
    exif[0x0112] = 3
    colours = np.zeros((2, 1, 3), np.uint8)
    colours[0] = 255
    return saved(Image.fromarray(colours), exif=exif)


def _palette(**how) -> str:
    image = Image.new("P", (1, 2), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 1), 1)
    return saved(image, **how)


@pytest.mark.parametrize(
    ("address", "colours"),
    [
        (saved(Image.fromarray(np.array([[40_000], [257]], np.uint16))), [156, 1]),
        (saved(Image.fromarray(np.array([[40_000], [257]], np.uint16)), transparency=257), [156, 255]),
        (saved(pixels([[200], [7]])), [200, 7]),
        (saved(pixels([[[200, 0]], [[7, 255]]])), [255, 7]),
        (saved(pixels([[[200, 1, 2, 0]], [[7, 8, 9, 255]]])), [(255,) * 3, (7, 8, 9)]),
        (saved(pixels([[[255, 0, 0, 51]], [[7, 8, 9, 255]]])), [(255, 204, 204), (7, 8, 9)]),
        (_palette(), [(10, 20, 30), (200, 100, 50)]),
        (_palette(transparency=0), [(255,) * 3, (200, 100, 50)]),
        (saved(Image.fromarray(np.array([[True], [False]]))), [255, 0]),
        (_upside_down(), [0, 255]),
    ],
    ids=range(10),
)
def test_a_picture_has_the_colours_that_one_sees_and_is_the_right_way_up(tmp_path, address, colours):
    (episode,), _ = imported(write(tmp_path / "rows.jsonl", shown(picture(address))))
    seen = png.decode(episode.steps[0].observation.png)
    expected = np.array([[(c,) * 3 if isinstance(c, int) else c] for c in colours])
    assert seen.shape == expected.shape and (seen == expected).all(), seen


def test_a_photograph_in_cmyk_or_with_a_second_picture_is_read(tmp_path):
    colour = Image.new("RGB", (16, 16), (200, 100, 50))
    for address in (saved(colour.convert("CMYK"), "jpeg"), saved(colour, "mpo", save_all=True, append_images=[colour])):
        address = address.replace("/mpo", "/jpeg")
        (episode,), _ = imported(write(tmp_path / "rows.jsonl", shown(picture(address))))
        assert np.abs(png.decode(episode.steps[0].observation.png).astype(int) - (200, 100, 50)).max() < 6


@pytest.mark.parametrize("seed", [7, "7", 7.0, "7.0"])
def test_a_seed_is_a_whole_number_however_it_is_written(tmp_path, seed):
    (episode,), _ = imported(write(tmp_path / "rows.jsonl", GOOD | {"metadata": {"seed": seed}}))
    assert episode.seed == 7


@pytest.mark.parametrize("seed", [None, "", float("nan")])
def test_a_seed_that_is_missing_is_none(tmp_path, seed):
    (episode,), _ = imported(write(tmp_path / "rows.jsonl", GOOD | {"metadata": {"seed": seed}}))
    assert episode.seed is None


def test_episodes_whose_ids_differ_late_stay_different(tmp_path):
    lines = [GOOD | {"metadata": {"episode_id": "x" * 300 + end, "step": 0}} for end in "ab"]
    episodes, report = imported(write(tmp_path / "rows.jsonl", *lines))
    assert report.decisions == {"read": 2, "usable": 2}
    assert len({episode.id for episode in episodes}) == 2 and all(len(episode.id) < 220 for episode in episodes)


@pytest.mark.parametrize(("reply", "reason"), REPLIES, ids=range(len(REPLIES)))
def test_an_unreadable_reply_is_kept_as_invalid_and_falls_in_the_filter(tmp_path, reply, reason):
    episodes, report = imported(write(tmp_path / "rows.jsonl", GOOD, {"messages": [user("look"), reply]}))
    assert report.invalid == {reason: 1}
    assert report.decisions == {"read": 2, "usable": 1, "unreadable": 1}
    funnel = Funnel()
    assert len(list(select(episodes, Filter(), funnel))) == 1
    assert funnel.decisions["require_valid_tool_calls"] == 1
    assert funnel.teachers["friends"].as_dict(None)["invalid_rate"] == 0.5


def test_usable_decisions_without_a_picture_are_counted(tmp_path):
    lines = [GOOD, {"messages": [user("look"), NOOP]}, {"messages": [user("look"), REPLIES[0][0]]}]
    _, report = imported(write(tmp_path / "rows.jsonl", *lines))
    assert report.pictures == {"with": 1, "without": 1}
    said = imports.summary(report)
    assert said == (
        "2 usable decisions from 3 lines; 1 of them without a picture; unreadable replies: 1 × no tool call"
    )


def call(name: str, arguments: object) -> dict:
    """A reply with one call, the arguments as the text that they are in OpenAI's form."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": text}}]}


def hermes(name: str, arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


WAYS = {"left": "move_left", "right": "move_right", "0": "noop"}
TOOLS = {
    "interact_many": Tool(),
    "move": Tool(argument="direction", names=WAYS),
    "wait": Tool(action="noop"),
}
TWO = {"role": "assistant", "tool_calls": [*call("move", {"direction": "left"})["tool_calls"], *NOOP["tool_calls"]]}
BROKEN = {"role": "assistant", "tool_calls": [*TWO["tool_calls"], *call("move", "{")["tool_calls"]]}


@pytest.mark.parametrize(
    ("reply", "actions", "why"),
    [
        (call("interact_many", {"actions": ["do", "move_up"], "reasoning": "wood"}), ("do", "move_up"), ""),
        (call("interact_many", {"actions": "do"}), ("do",), ""),
        (call("move", {"direction": "left"}), ("move_left",), ""),
        (call("move", {"direction": ["left", "right"]}), ("move_left", "move_right"), ""),
        (call("move", {"direction": "sleep"}), ("sleep",), ""),  # Crafter's own name
        (call("move", {"direction": 0}), ("noop",), ""),
        (call("wait", ""), ("noop",), ""),
        (call("move", ""), (), "the arguments are not valid JSON"),
        (call("wait", {}), ("noop",), ""),
        ({"role": "assistant", "content": "So: " + hermes("move", {"direction": "right"})}, ("move_right",), ""),
        ({"role": "assistant", "function_call": {"name": "wait", "arguments": "{}"}}, ("noop",), ""),
        ({"role": "assistant", "content": [{"type": "tool_use", "name": "wait", "input": {}}]}, ("noop",), ""),
        (NOOP, ("noop",), ""),
        (TWO, ("move_left", "noop"), ""),
        (BROKEN, (), "the arguments are not valid JSON"),
        ({"role": "assistant", "content": hermes("wait", {}) + "<tool_call>{"}, (), "the tool call is not valid JSON"),
        (
            {"role": "assistant", "tool_calls": [None, {"function": {"name": ["wait"]}}]},
            (),
            "the tool call has no name",
        ),
        (call("move", {"direction": "up"}), (), "unknown action 'up'"),
        (call("move", {"direction": 1}), (), "an action that is not a text"),
        (call("move", {"way": "left"}), (), "the arguments have no list of actions"),
        (call("move", ["left"]), (), "the arguments have no list of actions"),
        (call("interact_many", {"actions": ["do"] * 21}), (), "21 actions asked for, at most 20 allowed"),
        (call("dance", {}), (), "unknown tool 'dance'"),
    ],
)
def test_calls_of_others_tools_are_read_as_the_settings_say(tmp_path, reply, actions, why):
    path = write(tmp_path / "rows.jsonl", {"messages": [user("look"), reply, user("then"), NOOP]})
    (episode,), report = imported(path, tools=TOOLS)
    first, second = episode.steps
    assert (first.asked, first.invalid) == (actions, why) and second.step == max(1, len(actions))
    assert report.decisions["unreadable"] == bool(why)
    assert chat_rows.row(episode, second, SHOWN)["messages"][-1] == NOOP


def test_tools_that_nobody_explained_are_named_with_what_to_write(tmp_path):
    replies = [call(f"tool_{number}", {}) for number in range(30)]
    path = write(tmp_path / "rows.jsonl", *({"messages": [user("look"), reply]} for reply in replies), GOOD)
    _, report = imported(path)
    assert report.invalid == {"unknown tool": 30} and len(report.tools) == 10
    assert "unreadable replies: 30 × unknown tool (tool_0, tool_1" in imports.summary(report)
    write(path, {"messages": [user("look"), call("interact_many", {"actions": ["do"]})]})
    with pytest.raises(NothingUsable, match=r"imports: \{friends: \{file: .*, tools: \{interact_many: \{\}\}\}\}"):
        imported(path)


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    """What `collect` of another checkout wrote."""
    path = tmp_path_factory.mktemp("theirs") / "expert.parquet"
    store.write(path, play(Scripted("expert"), Spec(range(3), 40, SHOWN)))
    return path


def test_a_trace_of_another_checkout_comes_with_all_that_is_known(trace):
    theirs = list(store.read(trace))
    episodes, report = imported(trace)
    assert report.decisions == {"read": 120, "usable": 120} and report.pictures == {"with": 120}
    assert [episode.id for episode in episodes] == [f"friends-{episode.id}" for episode in theirs]
    columns = [store.to_table(episode).drop_columns(["episode_id", "agent"]) for episode in (*episodes, *theirs)]
    assert columns[:3] == columns[3:]
    funnel = Funnel()
    kept = list(select(episodes, Filter(min_achievements_per_episode=1), funnel))
    assert kept and funnel.teachers["friends"].as_dict(None)["achievements_mean"] > 1
    row = chat_rows.row(kept[0], kept[0].steps[0], Prompt(mode="text"))  # shown as our student is
    assert row["messages"] == chat_rows.row(theirs[0], theirs[0].steps[0], Prompt(mode="text"))["messages"]


def test_a_trace_from_before_it_said_why_episodes_end_is_read(trace, tmp_path):
    store.pq.write_table(store.pq.read_table(trace).drop_columns(["ending"]), tmp_path / "old.parquet")
    episodes, report = imported(tmp_path / "old.parquet")
    assert report.decisions == {"read": 120, "usable": 120}
    assert {step.ending for episode in episodes for step in episode.steps} == {""}


def test_what_cannot_be_used_of_a_trace_is_counted(trace, tmp_path):
    one, two, three = store.read(trace)
    odd = [
        one,
        replace(two, prompt='{"mode": "smell"}'),
        replace(two, steps=(damaged(two.steps[0], view=np.full((7, 9), 255, np.uint8)),)),
        replace(two, steps=(damaged(two.steps[0], png=b"no picture"),)),
        replace(two, steps=(damaged(two.steps[0], png=png.encode(np.zeros((8, 8, 3), np.uint8))),)),
        three,
    ]
    store.write(tmp_path / "odd.parquet", (replace(e, name=f"{n}") for n, e in enumerate(odd)))
    episodes, report = imported(tmp_path / "odd.parquet", held_out=[three.seed])
    assert [episode.seed for episode in episodes] == [one.seed]
    assert report.lines == {"read": 123, KEPT: 40}
    assert report.decisions == {"read": 83, "usable": 40, "no decision as this version records them": 43}
    given = replace(GIVEN, name="5", agent="expert")
    broken = replace(given, name="6", steps=(damaged(given.steps[0], messages=({"role": "user", "content": [{}]},)),))
    store.write(tmp_path / "given.parquet", [given, broken])
    episodes, report = imported(tmp_path / "given.parquet")
    assert [episode.imported for episode in episodes] == [True]
    assert report.decisions == {"read": 2, "usable": 1, "no decision as this version records them": 1}
    twice = [one, two, one]
    store.write(tmp_path / "twice.parquet", twice)
    episodes, report = imported(tmp_path / "twice.parquet")
    assert len(episodes) == 2 and report.decisions["the same episode and step again"] == 40


STEP = Step(0, (), Given((user("look"),), None), Reply(NOOP), ("noop",), "", ("noop",), 0.0, 0, (), False, False)
GIVEN = Episode("friends", None, (STEP,))


def damaged(step, **columns):
    return replace(step, observation=replace(step.observation, **columns))


def test_what_is_no_trace_is_a_sentence(trace, tmp_path):
    data = trace.read_bytes()
    (tmp_path / "text.parquet").write_bytes(b"hello")
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "flipped.parquet").write_bytes(data[:4] + bytes(3000) + data[3004:])
    store.pq.write_table(store.pq.read_table(trace).drop_columns(["view"]), tmp_path / "other.parquet")
    for name, said in (("text", "no trace"), ("cut", "no trace"), ("flipped", "damaged"), ("other", "other columns")):
        with pytest.raises(NothingUsable, match=said):
            imported(tmp_path / f"{name}.parquet")


def test_a_line_of_any_length_is_left_out_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(imports, "LONGEST_LINE", 10_000)
    long = GOOD | {"padding": "x" * 35_000}
    episodes, report = imported(write(tmp_path / "rows.jsonl", GOOD, long, GOOD))
    assert report.lines == {"read": 3, "longer than 32 MB": 1}
    assert len(episodes) == 2


def test_random_damage_never_crashes(rows, tmp_path):
    generator = random.Random(1)
    lines = [bytearray(json.dumps(row).encode()) for row in rows[:40]] * 3
    for line in lines:
        for _ in range(generator.choice([1, 3, 30])):
            line[generator.randrange(len(line))] = generator.choice(b'{}[]",:0a\x00\xff')
    _, report = imported(write(tmp_path / "rows.jsonl", GOOD, *map(bytes, lines)))
    assert report.decisions["usable"] >= 1
    left_out = sum(n for name, n in report.lines.items() if name != "read")
    assert report.lines["read"] == left_out + report.decisions["read"]
    assert report.decisions["read"] == sum(n for name, n in report.decisions.items() if name != "read")


def test_the_same_line_twice_is_one_decision(rows, tmp_path):
    _, report = imported(write(tmp_path / "rows.jsonl", *rows[:5], *rows[:5]))
    assert report.decisions == {"read": 10, "usable": 5, "the same episode and step again": 5}


def test_one_episode_is_on_one_world(rows, tmp_path):
    other = rows[1] | {"metadata": rows[1]["metadata"] | {"seed": 77}}
    _, report = imported(write(tmp_path / "rows.jsonl", rows[0], other))
    assert report.lines == {"read": 2, "an episode on two seeds": 1}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ["the file is empty"]),
        ([b"x", b"y", {"messages": []}], ["2 times because: not JSON", "write one JSON object a line"]),
        ([shown(picture("https://example.org/a.png"))], ["a picture by address", "data: URLs"]),
        ([{"messages": [user("look"), REPLIES[1][0]]}], ["unknown action", "call the tool act with"]),
    ],
    ids=range(4),
)
def test_a_file_with_nothing_usable_is_an_error_with_the_remedy(tmp_path, lines, said):
    with pytest.raises(NothingUsable) as raised:
        imported(write(tmp_path / "rows.jsonl", *lines))
    for part in ["rows.jsonl", *said]:
        assert part in str(raised.value)


def test_filters_that_judge_an_episode_as_played_pass_over_imports(tmp_path):
    episodes, _ = imported(write(tmp_path / "rows.jsonl", GOOD, GOOD))
    strict = Filter(min_steps_per_episode=50, min_achievements_per_episode=9, min_unique_states=9)
    funnel = Funnel()
    assert len(list(select(episodes, strict.model_copy(update={"detect_loops": "episode"}), funnel))) == 1
    assert funnel.decisions == {"read": 2, "deduplicate": 1, "kept": 1}


# The faces: the stage, the command, and the stages after them.


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    tree = yaml.load((ROOT / "params.yaml").read_text())
    tree["teachers"] = {"expert": {"policy": "expert", "seeds": "0-1", "max_steps": 60}}
    with (tmp_path / "params.yaml").open("w") as file:
        yaml.dump(tree, file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(top: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=top, capture_output=True, text=True, timeout=120)


def stage(top: Path, name: str, *arguments: str) -> str:
    done = run(top, str(ROOT / "stages" / f"{name}.py"), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def apprentice(top: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run(top, "-c", "from apprentice.cli import main; main()", *arguments)


def test_an_import_is_filtered_and_split_beside_the_teachers(rows, checkout):
    elsewhere = [row | {"metadata": row["metadata"] | {"seed": 50 + row["metadata"]["seed"]}} for row in rows]
    write(checkout / "friends.jsonl", *elsewhere, GOOD, b"rubbish")
    done = apprentice(checkout, "import", "friends.jsonl")
    assert done.returncode == 0, done.stderr
    assert "1 × not JSON" in done.stdout
    after = params.load(checkout / "params.yaml")
    assert {name: source.file for name, source in after.imports.items()} == {"friends": "friends.jsonl"}
    stage(checkout, "collect", "expert")
    stage(checkout, "import", "friends")
    counted = json.loads((checkout / "metrics/imports/friends.json").read_text())
    assert counted["lines"] == {"read": len(rows) + 2, "not JSON": 1}
    said = stage(checkout, "filter")
    assert "expert" in said and "friends" in said
    teachers = json.loads((checkout / "metrics/teachers.json").read_text())
    assert teachers["expert"]["episodes"] == 2 and teachers["expert"]["achievements_mean"] > 1
    assert teachers["expert"]["cost_per_kept_decision_usd"] == 0
    assert teachers["friends"]["decisions"] == len(rows) + 1
    assert teachers["friends"]["achievements_mean"] is teachers["friends"]["cost_usd"] is None
    cost = json.loads((checkout / "metrics/cost.json").read_text())
    assert cost["judge_usd"] == cost["teachers"]["expert"]["cost_usd"] == 0
    assert cost["teachers"]["expert"]["decisions"] > 0 and cost["teachers"]["friends"]["cost_usd"] is None
    said = stage(checkout, "split")
    metrics = json.loads((checkout / "metrics/split.json").read_text())
    assert metrics["imported_rows"] == teachers["friends"]["kept_decisions"] > 0
    assert f"{metrics['imported_rows_with_another_system_prompt']} imported rows have another system prompt" in said
    split = {
        name: [json.loads(line)["metadata"] for line in (checkout / f"data/sft/{name}.jsonl").open()]
        for name in ("train", "val")
    }
    assert {row["teacher"] for row in split["train"]} == {"expert", "friends"}
    assert not {row["seed"] for row in split["train"]} & {row["seed"] for row in split["val"]}
    assert sum(row["seed"] is None for row in split["train"]) == 1  # never validated on
    assert metrics["pictures"] == sum(row["has_image"] for rows in split.values() for row in rows)


def test_a_trace_of_another_checkout_is_filtered_and_split_as_our_own(trace, checkout):
    (checkout / "theirs").mkdir()
    (checkout / "theirs/expert.parquet").write_bytes(trace.read_bytes())
    done = apprentice(checkout, "import", "theirs/expert.parquet", "--name", "theirs")
    assert done.returncode == 0 and "theirs: 120 usable decisions from 120 lines" in done.stdout, done.stderr
    stage(checkout, "collect", "expert")
    stage(checkout, "import", "theirs")
    stage(checkout, "filter")
    teachers = json.loads((checkout / "metrics/teachers.json").read_text())
    assert teachers["theirs"]["achievements_mean"] > 1 and teachers["theirs"]["cost_usd"] is None
    stage(checkout, "split")
    rows = [json.loads(line) for name in ("train", "val") for line in (checkout / f"data/sft/{name}.jsonl").open()]
    assert {row["metadata"]["teacher"] for row in rows} == {"expert", "theirs"}
    assert len({row["messages"][0]["content"] for row in rows}) == 1  # all shown as our student is
    metrics = json.loads((checkout / "metrics/split.json").read_text())
    assert metrics["imported_rows"] == metrics["imported_rows_without_picture"] == 0


def test_a_mapping_of_tools_stays_when_the_file_is_imported_again_and_the_stage_uses_it(rows, checkout):
    reply = call("interact_many", {"actions": ["do"]})
    others = [row | {"messages": [*row["messages"][:-1], reply]} for row in rows]
    write(checkout / "friends.jsonl", *others, {"messages": [user("look"), reply]})
    done = apprentice(checkout, "import", "friends.jsonl")
    assert done.returncode == 1 and "tools: {interact_many: {}}" in done.stderr
    text = (checkout / "params.yaml").read_text()
    explained = "imports: {friends: {file: friends.jsonl, tools: {interact_many: {}}}}"
    (checkout / "params.yaml").write_text(text.replace("imports: {}", explained))
    done = apprentice(checkout, "import", "friends.jsonl")
    assert done.returncode == 0, done.stderr
    assert "the student of profile tiny plays by the picture, which those lack" in done.stdout
    assert explained in (checkout / "params.yaml").read_text()
    stage(checkout, "import", "friends")
    counted = json.loads((checkout / "metrics/imports/friends.json").read_text())
    assert counted["decisions"] == {"read": len(rows) + 1, "usable": len(rows) + 1}
    stage(checkout, "collect", "expert")
    stage(checkout, "filter")
    assert "1 imported rows have no picture" in stage(checkout, "split")
    assert json.loads((checkout / "metrics/split.json").read_text())["imported_rows_without_picture"] == 1


def test_every_action_can_be_named():
    assert params.Action.__args__ == ACTIONS


def test_an_invalid_reply_that_the_filter_keeps_is_still_no_row_to_learn(rows, checkout):
    write(checkout / "friends.jsonl", *rows, {"messages": [user("look"), REPLIES[0][0]]})
    tree = yaml.load((checkout / "params.yaml").read_text())
    tree |= {"teachers": {}, "imports": {"friends": {"file": "friends.jsonl"}}}
    tree["filter"]["require_valid_tool_calls"] = "off"
    with (checkout / "params.yaml").open("w") as file:
        yaml.dump(tree, file)
    for name in (["import", "friends"], ["filter"], ["split"]):
        stage(checkout, *name)
    assert json.loads((checkout / "metrics/split.json").read_text())["invalid_left_out"] == 1
    texts = [(checkout / f"data/sft/{name}.jsonl").read_text() for name in ("train", "val")]
    assert not any(r"\"actions\": []" in text for text in texts)


def test_what_the_students_play_would_refuse_is_no_row_to_learn(rows, checkout):
    two, thinking = prompt.answer(["do", "do"]), prompt.answer(["do"], "<tool_call> is what I write")
    odd = [{"messages": [user("look"), reply]} for reply in (two, two, thinking)]
    write(checkout / "friends.jsonl", *rows, *odd)
    tree = yaml.load((checkout / "params.yaml").read_text())
    tree |= {"teachers": {}, "imports": {"friends": {"file": "friends.jsonl"}}}
    tree["filter"]["deduplicate"] = False
    with (checkout / "params.yaml").open("w") as file:
        yaml.dump(tree, file)
    for name in (["import", "friends"], ["filter"]):
        stage(checkout, *name)
    said = stage(checkout, "split")
    assert "2 replies are left out" in said and "2 × 2 actions asked for, at most 1 allowed" in said
    metrics = json.loads((checkout / "metrics/split.json").read_text())
    assert metrics["unplayable_left_out"] == 2
    answers = [
        json.loads(line)["messages"][-1]
        for name in ("train", "val")
        for line in (checkout / f"data/sft/{name}.jsonl").open()
    ]
    assert len(answers) == len(rows) + 1
    assert not any(prompt.parse({"content": prompt.spoken(answer)}, 1).invalid for answer in answers)


def test_where_play_would_refuse_all_the_error_says_what_to_raise(rows, checkout):
    two = [row | {"messages": [*row["messages"][:-1], prompt.answer(["do", "do"])]} for row in rows]
    write(checkout / "friends.jsonl", *two)
    tree = yaml.load((checkout / "params.yaml").read_text())
    tree |= {"teachers": {}, "imports": {"friends": {"file": "friends.jsonl"}}}
    with (checkout / "params.yaml").open("w") as file:
        yaml.dump(tree, file)
    for name in (["import", "friends"], ["filter"]):
        stage(checkout, *name)
    done = run(checkout, str(ROOT / "stages/split.py"))
    assert done.returncode == 1 and "raise profiles.tiny.prompt.max_actions" in done.stderr, done.stderr


def test_what_spells_a_special_token_is_plain_letters_in_the_rows(rows, checkout):
    odd = {"messages": [user("a<|im_end|>b", picture(url())), prompt.answer(["do"], "x<|im_start|>y")]}
    write(checkout / "friends.jsonl", *rows, odd)
    tree = yaml.load((checkout / "params.yaml").read_text())
    tree |= {"teachers": {}, "imports": {"friends": {"file": "friends.jsonl"}}}
    tree["split"]["include_rationale"] = True
    with (checkout / "params.yaml").open("w") as file:
        yaml.dump(tree, file)
    for name in (["import", "friends"], ["filter"], ["split"]):
        stage(checkout, *name)
    text = (checkout / "data/sft/train.jsonl").read_text()
    assert "a< |im_end|>b" in text and "x< |im_start|>y" in text and "<|" not in text


def test_rows_without_seeds_alone_cannot_be_split_and_the_error_says_why(checkout):
    write(checkout / "friends.jsonl", *({"messages": [user(str(number)), NOOP]} for number in range(9)))
    tree = yaml.load((checkout / "params.yaml").read_text())
    tree |= {"teachers": {}, "imports": {"friends": {"file": "friends.jsonl"}}}
    with (checkout / "params.yaml").open("w") as file:
        yaml.dump(tree, file)
    for name in (["import", "friends"], ["filter"]):
        stage(checkout, *name)
    done = run(checkout, str(ROOT / "stages/split.py"))
    assert done.returncode == 1 and "unless their metadata has a seed" in done.stderr


def test_imported_rows_with_other_pictures_or_none_train_with_ours(rows, tiny, tmp_path):
    import torch

    model, processor = tiny
    others = [{"messages": [user("text"), NOOP]}, {"messages": [user("look", picture(url(40, 24, "jpeg"))), NOOP]}]
    episodes, _ = imported(write(tmp_path / "rows.jsonl", *others))
    given = [chat_rows.row(episode, step, Prompt()) for episode in episodes for step in episode.steps]
    encoded = [encoding.encode(processor, row["messages"]) for row in (rows[0], *given)]
    with torch.no_grad():
        loss = model(**encoding.batch(processor, encoded)).loss
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.jsonl"], 2, "there is no file missing.jsonl"),
        (["good.jsonl", "--name", "expert"], 2, "both a teacher and an import"),
        (["good.jsonl", "--name", "2nd"], 2, "2nd"),
        (["good.jsonl", "bad.jsonl", "--name", "x"], 2, "one by one"),
        (["good.jsonl", "bad.jsonl"], 1, "write one JSON object a line"),
        (["data/sft/train.jsonl"], 2, "copy it to another folder"),
        (["cut.parquet"], 1, "cut.parquet is damaged, or no trace"),
    ],
)
def test_what_cannot_be_imported_is_one_sentence_and_changes_nothing(checkout, arguments, code, said):
    write(checkout / "good.jsonl", GOOD)
    write(checkout / "bad.jsonl", b"rubbish")
    write(checkout / "cut.parquet", b"PAR1")
    (checkout / "data/sft").mkdir(parents=True)
    write(checkout / "data/sft/train.jsonl", GOOD)
    before = (checkout / "params.yaml").read_bytes()
    done = apprentice(checkout, "import", *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert (checkout / "params.yaml").read_bytes() == before


def test_comments_of_the_parameters_survive(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    lines = params.with_imports({"friends": "chats.jsonl"}, path).splitlines()
    changed = [(b, a) for b, a in zip(path.read_text().splitlines(), lines, strict=True) if a != b]
    ((before, after),) = changed
    assert before.startswith("imports: {}") and after.startswith("imports: {friends: {file: chats.jsonl}}")


def test_worlds_of_rls_evaluation_are_not_taught(rows, checkout):
    kept = rows[0] | {"metadata": rows[0]["metadata"] | {"seed": "310000.0"}}
    write(checkout / "friends.jsonl", kept, *rows[1:3])
    done = apprentice(checkout, "import", "friends.jsonl")
    assert done.returncode == 0 and f"1 × {KEPT}" in done.stdout, done.stderr
    stage(checkout, "import", "friends")
    assert json.loads((checkout / "metrics/imports/friends.json").read_text())["lines"][KEPT] == 1


def test_a_missing_file_is_named_by_the_stage_with_code_2(checkout):
    text = (checkout / "params.yaml").read_text().replace("imports: {}", "imports: {x: {file: gone.jsonl}}")
    (checkout / "params.yaml").write_text(text)
    done = run(checkout, str(ROOT / "stages/import.py"), "x")
    assert done.returncode == 2 and "imports.x.file: there is no file gone.jsonl" in done.stderr


def test_help_comes_within_a_second():
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, "-c", "from apprentice.cli import main; main()", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "import" in done.stdout
    heavy = {"torch", "transformers", "crafter", "numba", "pyarrow", "openai", "scipy"}
    assert not heavy & {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
