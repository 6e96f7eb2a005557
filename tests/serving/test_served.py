"""What is trained is what is served: the same token ids and pixels, for hundreds of decisions of every kind."""

import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import trl
from PIL import Image
from served import KINDS, decisions
from transformers import AutoProcessor

from apprentice import prompt
from apprentice.data.dataset import write_jsonl
from apprentice.serving import in_process
from apprentice.student import loading
from apprentice.student.encoding import encode, pictures
from apprentice.training import examples
from apprentice.world import png

COUNT = 100


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def pairs(request, tiny_folder, tmp_path_factory):
    """(turn, row as read again, what training makes of it) of each decision."""
    found = list(decisions(request.param, COUNT))
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    write_jsonl(file, (row for _, row in found))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPRENTICE_CACHE", str(file.parent / "cache"))
        survey = examples.survey(file, tiny_folder, "served")
    rows = examples.Rows(file, loading.processor(tiny_folder), survey.places, range(COUNT))
    trained = rows.dataset[:]["encoded"]
    return [
        (turn, json.loads(line), encoded)
        for (turn, _), line, encoded in zip(found, file.read_text().splitlines(), trained, strict=True)
    ]


@pytest.fixture(scope="module")
def processor(tiny_folder, tmp_path_factory):
    """As it lies in an adapter's folder."""
    folder = tmp_path_factory.mktemp("adapter")
    loading.processor(tiny_folder).save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def test_the_decisions_are_of_every_kind(pairs):
    settings = pairs[0][0].settings
    assert len(pairs) == COUNT
    counts = {len(prompt.parse(row["messages"][-1]).actions) for _, row, _ in pairs}
    assert counts == set(range(1, settings.max_actions + 1))
    assert {bool(row["messages"][-1]["content"]) for _, row, _ in pairs} == {True, False}
    assert len({turn.history[-1:] for turn, _, _ in pairs}) > 10


def test_in_process_generation_is_given_what_training_is(pairs, tiny_folder):
    processor = loading.processor(tiny_folder)
    for turn, _, trained in pairs:
        asked = in_process.shown(processor, [turn])[0]
        assert asked.prompt_ids == trained.prompt_ids and asked.answer_ids == []
        _same(asked.pixel_values, trained.pixel_values)
        _same(asked.image_grid_thw, trained.image_grid_thw)


def test_a_server_of_openai_chats_gives_the_model_what_training_does(pairs, processor):
    for turn, _, trained in pairs:
        served = processor.apply_chat_template(
            as_served(turn.messages),
            tools=prompt.TOOLS,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert served["input_ids"][0].tolist() == trained.prompt_ids
        _same(served.get("pixel_values"), trained.pixel_values)
        _same(served.get("image_grid_thw"), trained.image_grid_thw)


def test_trls_training_variant_of_the_chat_template_would_say_the_same(pairs, processor):
    """It marks the answers, which `encode` knows without; students were trained with it once."""
    variant = (Path(trl.__file__).parent / "chat_templates" / "qwen3_vl_training.jinja").read_text()
    assert variant != processor.chat_template
    for _, row, trained in pairs:
        chat = as_served(row["messages"])
        ours = processor.apply_chat_template(chat, tools=prompt.TOOLS)
        assert ours == processor.apply_chat_template(chat, tools=prompt.TOOLS, chat_template=variant)
        assert ours.endswith(processor.tokenizer.decode(trained.answer_ids) + "\n")


def test_what_is_taught_is_read_as_the_actions_that_were_asked_for(pairs, processor):
    for _, row, trained in pairs:
        assert trained.answer_ids[-1] == processor.tokenizer.eos_token_id
        text = processor.tokenizer.decode(trained.answer_ids[:-1])
        assert prompt.parse({"content": text}) == prompt.parse(row["messages"][-1])
        assert text.startswith(row["messages"][-1]["content"] or "<tool_call>")


def test_what_a_student_says_is_trained_on_as_it_was_said(pairs, processor):
    """RL trains on sampled ids, SFT on a text's: they are the same where the student says what it was taught."""
    for _, _, trained in pairs:
        text = processor.tokenizer.decode(trained.answer_ids)
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == trained.answer_ids


def test_without_the_tools_it_would_not_be_the_same(pairs, processor):
    """Which is what TRL's own collator makes of rows with pictures."""
    _, row, trained = pairs[0]
    text = processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
    shown, place = encode(processor, row["messages"][:-1]).prompt_ids, processor.image_token_id
    shown = [token for token, before in pairwise([*shown, None]) if (token, before) != (place, place)]  # one a picture
    assert processor.tokenizer(text)["input_ids"] != shown
    assert trained.prompt_ids != processor.tokenizer(text)["input_ids"]


def as_served(messages: list[dict]) -> list[dict]:
    """OpenAI messages as vLLM hands them to a chat template: pictures decoded, the arguments of calls parsed."""
    found, images = [], iter(pictures(messages))
    for message in messages:
        message = dict(message)
        if isinstance(message["content"], list):
            message["content"] = [
                {"type": "image", "image": Image.open(io.BytesIO(png.encode(next(images))))}
                if "image_url" in part
                else part
                for part in message["content"]
            ]
        if "tool_calls" in message:
            functions = [call["function"] for call in message["tool_calls"]]
            functions = [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in functions]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        found.append(message)
    return found


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> None:
    assert (one is None) == (other is None)
    assert one is None or torch.equal(one, other)
