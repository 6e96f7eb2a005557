"""The student: a vision-language model and its processor; build the tiny one, load any."""

import ctypes
from collections.abc import Iterable
from pathlib import Path
from types import MethodType
from typing import Literal

import torch
import trl
from peft import PeftModel
from peft.tuners import lora
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from apprentice.params import Architecture
from apprentice.processes import cores
from apprentice.product import product, use_products
from apprentice.world import SIZE

TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen3_vl_training.jinja").read_text()
"""TRL's training variant of Qwen3-VL's chat template: the same text, and it knows which tokens are the answer."""

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


def build(architecture: Architecture, tokens: PreTrainedTokenizerFast, seed: int):
    """A real Qwen3-VL with random weights, one visual token for each game tile. Returns (model, processor)."""
    side = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    patch = {"size": side, "patch_size": _PIXELS_PER_TILE, "temporal_patch_size": 2, "merge_size": 1}
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


def processor(folder: Path | str):
    """What turns chats and pictures into a model's inputs."""
    found = AutoProcessor.from_pretrained(folder)
    found.chat_template = found.tokenizer.chat_template = TEMPLATE
    return found


def load(
    folder: Path | str,
    adapter: Path | str | None = None,
    dtype: str = "float32",
    trainable: bool = False,
    quantization: Literal["nf4"] | None = None,
):
    """A model of Hugging Face's form, with a PEFT adapter if one is given. Returns (model, processor).

    quantization: hold the linear layers' weights in 4 bits, for QLoRA.
    """
    how = {"dtype": getattr(torch, dtype)}
    if quantization:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=how["dtype"],
            # On a CPU widths have to be multiples of 64, which that of the tiny student's tower isn't.
            llm_int8_skip_modules=None if torch.cuda.is_available() else ["model.visual", "lm_head"],
        )
    if not torch.cuda.is_available():
        keep_freed_memory()
    elif not is_deepspeed_zero3_enabled():  # which places the weights itself
        how["device_map"] = {"": torch.cuda.current_device()}
    model = AutoModelForImageTextToText.from_pretrained(folder, **how)
    if not torch.cuda.is_available():
        use_products(model)
    if adapter:
        model = fold(PeftModel.from_pretrained(model, adapter, is_trainable=trainable))
        # The adapter may name a model of the hub; PEFT would ask there for its vocabulary whenever it saves.
        model.peft_config["default"].base_model_name_or_path = str(folder)
    return model.eval(), processor(folder)


def fold(model):
    """On a CPU, let LoRA layers compute (W + scaling·B·A)·x as one product; the same function but for rounding.

    PEFT's three products of a layer as narrow as the tiny student's take half as long again. With dropout, which acts
    between them, and on GPUs, where layers are wide and ranks small, they stay. Returns the model.
    """
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    dropout = any(isinstance(part, torch.nn.Dropout) for layer in layers for part in layer.lora_dropout.values())
    for layer in [] if dropout or torch.cuda.is_available() else layers:
        layer.forward = MethodType(_folded, layer)
    return model


def _folded(layer: lora.Linear, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    base = layer.get_base_layer()
    if layer.disable_adapters or layer.merged:
        return base(x)
    weight = base.weight
    for name in layer.active_adapters:
        if name in layer.scaling:
            weight = weight + layer.get_delta_weight(name)
    return product(x, weight, base.bias)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next use; it gives large blocks back to the system at once.

    Getting them again, zeroed page by page, takes a fifth of the time of play and training on a CPU.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold, most = -1, -3, 1 << 30
        library.mallopt(m_mmap_threshold, most)
        library.mallopt(m_trim_threshold, most)


def use_all_cores() -> None:
    """Let torch compute on every core that this process may use; its own default is not always that."""
    torch.set_num_threads(cores())
