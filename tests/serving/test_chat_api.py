"""`apprentice serve rl`: the student answers OpenAI's own client, many at once, and refuses what it can't answer."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
import stand_in
from command_line import run
from small import checkout, stage

from apprentice import params, prompt, store
from apprentice.pipeline import ROOT
from apprentice.policy import Turn
from apprentice.serving import chat_api, in_process
from apprentice.world import World, png

SHOWN = params.load(ROOT / "params.yaml").active.prompt


@pytest.fixture(scope="module")
def top(tiny_folder, tmp_path_factory):
    """A checkout with the untrained student as base."""
    top = checkout(tmp_path_factory.mktemp("served") / "top", {"profiles.tiny.dtype": "float32"})
    (top / "models").mkdir()
    (top / "models/base").symlink_to(tiny_folder)
    return top


@pytest.fixture(scope="module")
def address(top):
    with serving(top, "base") as url:
        yield url


@contextmanager
def serving(top: Path, name: str):
    """The command, in a process of its own; gives its address."""
    command = [sys.executable, "-m", "apprentice", "serve", name, "--port", "0"]
    process = subprocess.Popen(command, cwd=top, env=os.environ, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[2]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as found:
        yield found


def asked(seed: int = 1, **more) -> dict:
    return {"model": "base", "messages": prompt.messages(World(seed).reset(), SHOWN), "tools": prompt.TOOLS, **more}


def test_the_models_are_those_that_are_served(client):
    assert [model.id for model in client.models.list()] == ["base"]
    assert client.models.retrieve("base").id == "base"


def test_an_answer_is_the_student_s_own(client, tiny):
    """The same words and log-probabilities as in play, at temperature 0."""
    reply = client.chat.completions.create(**asked(temperature=0, max_tokens=6, logprobs=True))
    [row] = in_process.shown(tiny[1], [Turn(World(1).reset(), (), SHOWN)])
    [(ids, logprobs, *_)] = in_process.generate(*tiny, [row], np.zeros((1, 6)), 0.0)
    choice = reply.choices[0]
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(logprobs, abs=1e-4)
    assert reply.usage.prompt_tokens == len(row.prompt_ids) and reply.usage.completion_tokens == len(ids)
    assert choice.finish_reason in ("stop", "length") and choice.message.content == tiny[1].tokenizer.decode(ids)


def test_a_seed_gives_the_same_answer_again_and_another_gives_another(client):
    said = [client.chat.completions.create(**asked(seed=1, max_tokens=8) | {"seed": seed}) for seed in (7, 7, 8)]
    words = [answer.choices[0].message.content for answer in said]
    assert words[0] == words[1] != words[2]
    many = client.chat.completions.create(**asked(max_tokens=4, n=3))
    assert [choice.index for choice in many.choices] == [0, 1, 2]


def test_a_stream_says_the_same_and_ends(client):
    whole = client.chat.completions.create(**asked(max_tokens=6) | {"seed": 3})
    options = {"include_usage": True}
    parts = list(
        client.chat.completions.create(**asked(max_tokens=6, stream=True, stream_options=options) | {"seed": 3})
    )
    words = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert words == whole.choices[0].message.content
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason and parts[-1].usage == whole.usage


def test_those_who_ask_together_are_answered_together(client):
    """Each with what it gets alone."""
    alone = [client.chat.completions.create(**asked(seed, temperature=0, max_tokens=3)) for seed in range(4)]
    found = {}

    def ask(seed: int) -> None:
        found[seed] = client.chat.completions.create(**asked(seed, temperature=0, max_tokens=3 + seed % 2))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert found[seed].choices[0].message.content.startswith(alone[seed].choices[0].message.content)


def test_on_vllm_it_is_the_same(client, top):
    """By the stand-in for vLLM, one server on this processor."""
    here = asked(temperature=0, max_tokens=6, logprobs=True)
    expected = client.chat.completions.create(**here)
    (top / "compute.yaml").write_text(f"vllm: {{use: always, program: {stand_in.program(top)}}}\n")
    with serving(top, "base") as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as vllm:
        reply = vllm.chat.completions.create(**here)
        assert reply.choices[0].message == expected.choices[0].message and reply.usage == expected.usage
        chances = [[token.logprob for token in one.choices[0].logprobs.content] for one in (reply, expected)]
        assert chances[0] == pytest.approx(chances[1], abs=1e-4)
        many = vllm.chat.completions.create(**asked(max_tokens=4, n=3) | {"seed": 3})
        assert len(many.choices) == 3
        for wrong, words in (({"max_tokens": 100_000}, "are asked for"), (pictured(picture(72, 72), 2), "1 may be")):
            with pytest.raises(openai.BadRequestError, match=words):
                vllm.chat.completions.create(**asked(max_tokens=2) | wrong)
        assert vllm.chat.completions.create(**asked(max_tokens=1)).choices


def test_a_teacher_can_be_the_student(address, tmp_path):
    """params.yaml names it as any model behind an API."""
    endpoint = {"model": "base", "base_url": address, "api_key_env": None, "tool_choice": "required", "max_tokens": 8}
    shown = SHOWN.model_dump(mode="json")
    teacher = {"policy": "chat", "seeds": "5-6", "max_steps": 3, "prompt": shown, "endpoint": endpoint}
    top = checkout(tmp_path / "top", {"teachers": {"student": teacher}})
    stage(top, tmp_path / "cache", "stages/collect.py", "student")
    for episode in store.read(top / "data/traces/student.parquet"):
        assert len(episode.steps) == 3 and all(step.reply.prompt_tokens > 80 for step in episode.steps)


def pictured(url: str, times: int = 1) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}] * times}]}


def picture(height: int, width: int) -> str:
    return "data:image/png;base64," + base64.b64encode(png.encode(np.zeros((height, width, 3), np.uint8))).decode()


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "gpt-4o"}, 404, "there is no model 'gpt-4o' here; there is 'base'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages.0.role is 'robot'"),
        ({"tools": [{"type": "function", "function": {"name": "move"}}]}, 400, "the tool act alone"),
        ({"top_p": 0.5}, 400, "top_p"),
        ({"extra_body": {"guided_json": {}}}, 400, "guided_json"),
        ({"max_tokens": 100_000}, 400, "are asked for"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "neither a text nor an image_url"),
        (pictured("http://169.254.169.254/latest"), 400, "is no data URL"),
        (pictured("file:///etc/passwd"), 400, "is no data URL"),
        (pictured("data:image/png;base64,AAAA"), 400, "cannot be read as a picture"),
        (pictured(picture(8, 4000)), 400, "4000 × 8 pixels; a side may have 2048"),
        (pictured(picture(72, 72), 17), 400, "there are 17 pictures; 16 may be"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_says_why(client, change, status, words):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asked(max_tokens=2) | change)
    assert caught.value.status_code == status and words in str(caught.value)
    assert client.chat.completions.create(**asked(max_tokens=1)).choices  # it goes on


def test_calls_are_read_as_vllm_reads_them():
    text = 'so: <tool_call>\n{"name": "act", "arguments": {"actions": ["noop"]}}\n</tool_call>'
    [call] = chat_api._calls(text)
    assert call["function"] == {"name": "act", "arguments": json.dumps({"actions": ["noop"]})}
    assert prompt.parse({"content": "", "tool_calls": [call]}).actions == ("noop",)
    assert chat_api._calls("<tool_call>{broken</tool_call>") == []


def test_an_unknown_name_and_a_missing_folder_are_said(tmp_path):
    top = checkout(tmp_path / "top", {})
    done = run(top, "serve", "robot")
    assert done.returncode == 2 and "there is: world, base, sft, distill, rl" in done.stderr
    done = run(top, "serve", "rl", "--port", "0")
    assert done.returncode == 2 and "rl needs models/base, which is not there; make it by dvc repro" in done.stderr
