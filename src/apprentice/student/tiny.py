"""The tiny student: a real Qwen3-VL with small numbers, random weights and a tokenizer of its own."""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from apprentice.params import Architecture
from apprentice.student.template import TEMPLATE
from apprentice.world.observation import SIZE, VIEW

_SPECIAL = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
    "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)]  # fmt: skip
# Not special in Qwen's tokenizers either: a parser of tool calls has to see them in the text.
_MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_PATTERN = r" ?[A-Za-z_\-]+| ?[0-9]| ?[^\sA-Za-z0-9_\-]+|\s"
_PIXELS_PER_TILE = 8


def tokenizer(texts: Iterable[str], phrases: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on these texts, with Qwen's special tokens.

    phrases: text that is the same in every conversation; each becomes one token, so that a decision stays short.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    phrases = sorted(set(phrases))
    added = len(_SPECIAL) + len(_MARKS) + len(phrases)
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary - added,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    bpe.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in _SPECIAL])
    bpe.add_tokens([AddedToken(text, normalized=False, special=False) for text in [*_MARKS, *phrases]])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def build(
    architecture: Architecture, tokens: PreTrainedTokenizerFast, seed: int
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """A real Qwen3-VL with random weights, one visual token for each game tile. Returns (model, processor)."""
    pixels = {"shortest_edge": SIZE * SIZE * VIEW[1] // VIEW[0], "longest_edge": SIZE * SIZE}  # areas, of both pictures
    patch: dict[str, Any] = {"size": pixels, "patch_size": _PIXELS_PER_TILE, "temporal_patch_size": 2, "merge_size": 1}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, **patch),
        tokenizer=tokens,
        video_processor=Qwen3VLVideoProcessor(**patch),
        chat_template=TEMPLATE,
    )
    a, token = architecture, tokens.convert_tokens_to_ids
    head = a.hidden_size // a.heads
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": -(-len(tokens) // 64) * 64,
            "hidden_size": a.hidden_size,
            "intermediate_size": 2 * a.hidden_size,
            "num_hidden_layers": a.layers,
            "num_attention_heads": a.heads,
            "num_key_value_heads": max(1, a.heads // 2),
            "head_dim": head,
            "max_position_embeddings": 4096,
            "initializer_range": a.initializer_range,
            "tie_word_embeddings": True,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": a.vision_layers,
            "hidden_size": a.vision_hidden_size,
            "intermediate_size": 2 * a.vision_hidden_size,
            "num_heads": a.vision_heads,
            "in_channels": 3,
            "patch_size": _PIXELS_PER_TILE,
            "spatial_merge_size": 1,
            "temporal_patch_size": 2,
            "out_hidden_size": a.hidden_size,
            "num_position_embeddings": (SIZE // _PIXELS_PER_TILE) ** 2,
            "deepstack_visual_indexes": [0],
            "initializer_range": a.initializer_range,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[token("<|im_end|>"), token("<|endoftext|>")], pad_token_id=token("<|endoftext|>")
    )
    return model, processor
