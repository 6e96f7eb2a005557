"""The student: a vision-language model and its processor; build the tiny one, load any."""

import ctypes
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    Qwen3VLProcessor,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from apprentice import gpus
from apprentice.params import Lora
from apprentice.student.onednn import product, use_products
from apprentice.student.template import TEMPLATE
from apprentice.workers import cores


def processor(folder: Path | str) -> Qwen3VLProcessor:
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
) -> tuple[PreTrainedModel | PeftModel, Qwen3VLProcessor]:
    """A model of Hugging Face's form, with a PEFT adapter if one is given. Returns (model, processor).

    quantization: hold the linear layers' weights in 4 bits, for QLoRA: the decoder's, not those of the tower, which is
    small and has to see exactly, nor of the head.
    """
    how: dict[str, Any] = {"dtype": torch.float32 if dtype == "mixed" else getattr(torch, dtype)}
    if quantization:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=how["dtype"],
            llm_int8_skip_modules=["model.visual", "lm_head"],
        )
    if not gpus.used():
        keep_freed_memory()
    elif not is_deepspeed_zero3_enabled():  # which places the weights itself
        how["device_map"] = {"": torch.cuda.current_device()}
    model: PreTrainedModel | PeftModel = AutoModelForImageTextToText.from_pretrained(folder, **how)
    if not gpus.used():
        use_products(model, rounded=dtype == "mixed")
    if adapter:
        model = fold(PeftModel.from_pretrained(model, adapter, is_trainable=trainable))
        # The adapter may name a model of the hub; PEFT would ask there for its vocabulary whenever it saves.
        model.peft_config["default"].base_model_name_or_path = str(folder)
    return model.eval(), processor(folder)


def lora_config(lora: Lora) -> LoraConfig:
    """PEFT's form of the settings."""
    targets = lora.target_modules
    return LoraConfig(
        exclude_modules=None if lora.vision else r".*visual.*",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def fold(model: PeftModel) -> PeftModel:
    """On a CPU, let LoRA layers compute (W + scaling·B·A)·x as one product; the same function but for rounding.

    PEFT's three products of a layer as narrow as the tiny student's take half as long again. With dropout, which acts
    between them, and on GPUs, where layers are wide and ranks small, they stay. Returns the model.
    """
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    dropout = any(isinstance(part, torch.nn.Dropout) for layer in layers for part in layer.lora_dropout.values())
    for layer in [] if dropout or gpus.used() else layers:
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


def keep_precision(model: PeftModel) -> None:
    """Let LoRA layers take what they are given as it is, where a trainer's autocast computes in bfloat16 anyway.

    PEFT's adapters are float32, which is right for small updates, and PEFT turns all that comes in into float32 too.
    Autocast turns it back: the same numbers, for 15 % of a step on a CPU and twice the memory (LOG.md). Outside of
    autocast such a model doesn't compute.
    """
    for module in model.modules():
        if isinstance(module, lora.LoraLayer):
            module.cast_input_dtype_enabled = False


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
