"""The stand-in for the hub's Qwen3-VL has its numbers."""

import re

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from apprentice import params
from apprentice.cloud.estimate import estimate
from apprentice.compute import Compute
from apprentice.data.chat_rows import row
from apprentice.pipeline import ROOT
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.student import sizes
from apprentice.student.encoding import encode

PROMPT = params.load(ROOT / "params.yaml").profiles["qwen2b"].prompt


@pytest.fixture(scope="module")
def processor():
    return sizes.processor(PROMPT)


@pytest.mark.parametrize("size", sizes.PARAMETERS)
def test_a_size_has_as_many_parameters_as_the_hub_says(size):
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(sizes.config(size))
    assert model.num_parameters() == sizes.PARAMETERS[size]


def test_a_decision_is_as_long_as_with_the_hubs_tokenizer_and_81_of_it_are_the_picture(processor):
    episode = play(Scripted("expert"), Spec([3], 60, PROMPT))[0]
    for step in episode.steps[::20]:
        encoded = encode(processor, row(episode, step, PROMPT)["messages"])
        assert 1250 < len(encoded.prompt_ids) + len(encoded.answer_ids) < 1300
        assert encoded.prompt_ids.count(processor.image_token_id) == 81
        assert encoded.image_grid_thw.tolist() == [[1, 18, 18]]


def test_the_estimate_reckons_with_as_many_tokens():
    settings = params.load(ROOT / "params.yaml")
    settings = settings.model_copy(update={"profile": "qwen2b"})
    sft = next(stage for stage in estimate(settings, Compute())["stages"] if stage["stage"] == "sft")
    each = int(re.search(r"([\d,]+) tokens", sft["how"])[1].replace(",", ""))
    assert 1269 <= each <= 1273, sft["how"]


def test_special_tokens_have_qwens_ids(processor):
    ids = {"<|im_end|>": 151645, "<|vision_start|>": 151652, "<|image_pad|>": 151655, "<tool_call>": 151657}
    config = sizes.config("2b", layers=2, width=64)
    assert processor.tokenizer.convert_tokens_to_ids(list(ids)) == list(ids.values())
    assert (config.vision_start_token_id, config.image_token_id) == (151652, processor.image_token_id)
