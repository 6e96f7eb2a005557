"""The hub's Qwen3-VL in numbers, for what has to be tried or measured without its weights.

Whole, as the hub has it, or with few layers and narrow: the classes, the ids of special tokens, the size of the
vocabulary and the 2 × 2 merging of patches stay the real ones. A picture of 288 × 288 pixels is 81 visual tokens.
"""

import json
from collections.abc import Iterable
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from apprentice import prompt
from apprentice.params import Prompt
from apprentice.student import tiny
from apprentice.student.template import TEMPLATE
from apprentice.world.observation import ACTIONS
from apprentice.world.world import World

Size = Literal["2b", "4b", "8b"]
PARAMETERS = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696}
"""How many parameters the hub gives for the weights of Qwen/Qwen3-VL-{2B,4B,8B}-Instruct."""
_SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
# From config.json at the revisions of params.yaml.
_TEXT = {
    "2b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
_TOWER = {"2b": _SMALL_TOWER, "4b": _SMALL_TOWER, "8b": _LARGE_TOWER}
_VOCABULARY, _WORDS, _LEARNT = 151_936, 151_643, 870
_HEAD, _TOWER_HEAD = 128, 64


def config(size: Size, layers: int | None = None, width: int | None = None) -> Qwen3VLConfig:
    """The configuration of a size.

    layers: of the decoder and of the tower, at least 2; None are all. width: of both, a multiple of 64; None is the
    real one.
    """
    text: dict[str, Any] = _TEXT[size] | {"num_key_value_heads": 8}
    tower: dict[str, Any] = _TOWER[size] | {"num_heads": 16}
    if layers:
        text |= {"num_hidden_layers": layers}
        tower |= {"depth": layers, "deepstack_visual_indexes": list(range(min(3, layers - 1)))}
    if width:
        narrow = {"hidden_size": width, "intermediate_size": 2 * width}
        text |= narrow | {"num_attention_heads": 2, "num_key_value_heads": 1}
        tower |= narrow | {"num_heads": width // _TOWER_HEAD}
    return Qwen3VLConfig(
        text_config=text
        | {
            "vocab_size": _VOCABULARY,
            "head_dim": _HEAD,
            "max_position_embeddings": 262_144,
            "tie_word_embeddings": size != "8b",
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config=tower
        | {
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
        },
        image_token_id=151_655,
        video_token_id=151_656,
        vision_start_token_id=151_652,
        vision_end_token_id=151_653,
        tie_word_embeddings=size != "8b",
    )


def build(made: Qwen3VLConfig, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A model of this configuration with random weights, on torch's default device and in its default dtype."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(made)
    model.generation_config = GenerationConfig(eos_token_id=[151_645, 151_643], pad_token_id=151_643)
    return model


def processor(shown: Prompt) -> Qwen3VLProcessor:
    """The processor of all sizes, but for its words, which are learnt from what a player is shown.

    They are so many that a decision of the profile qwen2b has about as many tokens as the hub's tokenizer makes of it.
    """
    texts = [prompt.system(shown), json.dumps(prompt.TOOLS), TEMPLATE]
    texts.append(prompt.text(World(0).reset(), shown, ACTIONS[: shown.history]))
    patch: dict[str, Any] = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    patch |= {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, **patch),
        tokenizer=_tokenizer(texts),
        video_processor=Qwen3VLVideoProcessor(**patch),
        chat_template=TEMPLATE,
    )


def _tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One whose special tokens have Qwen's ids: what lies between them and the words is never produced."""
    made = tiny.tokenizer(texts, [], _LEARNT)
    tree = json.loads(made.backend_tokenizer.to_str())
    words = tree["model"]["vocab"]
    first = len(words)
    words |= {f"unused {number}": number for number in range(first, _WORDS)}
    for token in tree["added_tokens"]:
        token["id"] += _WORDS - first
    return type(made)(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)),
        eos_token=made.eos_token,
        pad_token=made.pad_token,
        model_max_length=262_144,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )
