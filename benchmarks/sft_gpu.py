"""How fast SFT of Qwen3-VL is on this machine's first device, and what each setting costs and brings.

    python benchmarks/sft_gpu.py 2b        also 4b, 8b; `tiny --steps 3` tries every line on a CPU

The model has random weights and the real size (no hub needed); rows are as long as those that the profile's prompt
gives, with random tokens. Each line changes one thing of the profile's settings and runs in a process of its own.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from apprentice import params
from apprentice.errors import WorkError
from apprentice.student import tiny
from apprentice.training import devices, memory

# config.json of Qwen/Qwen3-VL-{2B,4B,8B}-Instruct at the revisions of params.yaml. The numbers of parameters that they
# make, PARAMETERS, are those that the hub gives for the weights.
PARAMETERS = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696}
_SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
SIZES = {
    "2b": ({"hidden_size": 2048, "intermediate_size": 6144, "layers": 28, "heads": 16, "tied": True}, _SMALL_TOWER),
    "4b": ({"hidden_size": 2560, "intermediate_size": 9728, "layers": 36, "heads": 32, "tied": True}, _SMALL_TOWER),
    "8b": ({"hidden_size": 4096, "intermediate_size": 12288, "layers": 36, "heads": 32, "tied": False}, _LARGE_TOWER),
    "tiny": (
        {"hidden_size": 256, "intermediate_size": 512, "layers": 2, "heads": 2, "tied": True},
        {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "deepstack_visual_indexes": [0]},
    ),
}
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s, from NVIDIA's data sheets; of others, what a large product of matrices reaches."""
PATCHES, PICTURE, ANSWER = 18 * 18, 81, 30
"""Of a row: patches and visual tokens of 288 × 288 pixels; tokens of the answer."""
TEXT = 953
"""Tokens of prompt and tools in words, so that a row has the 1,064 that benchmarks/sft_data.py finds."""
IMAGE, START = 151655, 151652


def config(size: str):
    """The real configuration of a size."""
    from transformers import Qwen3VLConfig

    text, vision = SIZES[size]
    tower = vision | {"num_heads": 16, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2}
    tower |= {"out_hidden_size": text["hidden_size"], "num_position_embeddings": 2304, "in_channels": 3}
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": text["hidden_size"],
            "intermediate_size": text["intermediate_size"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "num_key_value_heads": min(8, text["heads"]),
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": text["tied"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config=tower,
        image_token_id=IMAGE,
        video_token_id=151656,
        vision_start_token_id=START,
        vision_end_token_id=151653,
        tie_word_embeddings=text["tied"],
    )


def rows(count: int, text: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch as `conversation.batch` makes it: a picture, text, an answer."""
    ids = torch.randint(0, 150_000, (count, text + PICTURE + ANSWER), generator=generator)
    ids[:, 8], ids[:, 9 : 9 + PICTURE], ids[:, 9 + PICTURE] = START, IMAGE, 151653
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(count * PATCHES, 3 * 2 * 16 * 16, generator=generator),
        "image_grid_thw": torch.tensor([[1, 18, 18]] * count),
    }


def variants(micro: int) -> dict[str, dict]:
    """What is measured: the name of each, and how it differs from the profile."""
    return {
        "the profile": {},
        "without gradient checkpointing": {"checkpointing": False},
        "the vision tower frozen": {"vision": False},
        "frozen, its features given": {"vision": False, "features": True},
        "QLoRA (nf4)": {"quantization": "nf4"},
        "QLoRA, without checkpointing": {"quantization": "nf4", "checkpointing": False},
        "attention: eager": {"attention": "eager"},
        "attention: flash 2": {"attention": "flash_attention_2"},
        "loss over all logits": {"fused": False},
        f"micro-batch {micro // 2 or 1}": {"micro": micro // 2 or 1},
        f"micro-batch {micro * 2}": {"micro": micro * 2},
        "micro-batch as before, without DeepSpeed": {"zero": 0},
        "ZeRO-3": {"zero": 3},
        "the fastest together": {"checkpointing": False, "vision": False},
    }


def flops(model, micro: int, text: int, vision: bool) -> float:
    """Of a step's rows, what the model itself needs: 2 for each weight and token forward, and as much backward.

    Frozen weights have no gradients of their own; what checkpointing computes twice isn't counted; attention's products
    are.
    """
    language, tower = model.config.get_text_config(), model.config.vision_config
    inside = sum(p.numel() for name, p in model.named_parameters() if "visual" in name and "lora" not in name)
    tokens, width, layers = text + PICTURE + ANSWER, language.hidden_size, language.num_hidden_layers
    attention = 4 * layers * language.num_attention_heads * language.head_dim
    heads = (2 * language.num_attention_heads + 2 * language.num_key_value_heads) * language.head_dim
    weights = layers * (3 * width * language.intermediate_size + width * heads)
    forward = 2 * weights * tokens + attention * tokens**2 / 2 + 2 * ANSWER * width * language.vocab_size
    seen = 2 * inside * PATCHES + 4 * tower.depth * tower.hidden_size * PATCHES**2
    return micro * (2 * forward + (2 if vision else 1) * seen)


def peak(device: torch.device) -> float:
    """FLOP/s that the device can do at most in bfloat16, in float32 on a CPU."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    for known, value in PEAK.items():
        if known in name:
            return value
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=kind)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        (matrix @ matrix).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def measure(size: str, folder: Path, found: Path, settings: dict, steps: int) -> None:
    """Train for some steps as the stage does; the result goes into a file, the process may die."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig

    from apprentice.student import loading
    from apprentice.training.sft import SftTrainer

    cuda, micro = torch.cuda.is_available(), settings["micro"]
    kind = torch.bfloat16 if cuda else torch.float32
    zero = params.Zero(stage=settings["zero"])
    arguments = SFTConfig(
        output_dir=str(folder / "out"),
        max_steps=steps,
        per_device_train_batch_size=micro,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=settings["checkpointing"],
        deepspeed=memory.zero_config(zero),
        save_strategy="no",
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        disable_tqdm=True,
    )
    how = {"device_map": {"": 0}} if cuda and zero.stage < 3 else {}
    if settings["quantization"]:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
        )
    model = AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=kind, attn_implementation=settings["attention"], **how
    )
    batch = rows(micro, settings["text"], torch.Generator().manual_seed(0))
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    class Timed(SftTrainer):
        def compute_loss(self, model, inputs, *rest, **named):
            if settings["fused"]:
                return super().compute_loss(model, inputs, *rest, **named)
            return model(**inputs, use_cache=False).loss

    trainer = Timed(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"images": [[0]] * micro * (steps + 1)}),
        data_collator=lambda _: dict(batch),
        processing_class=loading.processor(folder / "model"),
        peft_config=loading.lora_config(params.Lora(dropout=0.05, vision=settings["vision"])),
        callbacks=[Clock()],
    )
    if settings["features"]:  # computed once, as if read from a disk
        tower = trainer.model.base_model.model.model.visual
        with torch.no_grad():
            device = next(tower.parameters()).device
            pixels = batch["pixel_values"].to(device, kind)
            given = tower(pixels, grid_thw=batch["image_grid_thw"].to(device), return_dict=True)
        tower.forward = lambda *_, **__: type(given)(**given)  # which the model changes
    if zero.stage < 3:
        loading.fold(trainer.model)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = (ends[-1] - ends[1]) / (len(ends) - 2)  # the first two warm up
    if cuda:
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    needed = flops(trainer.model, micro, settings["text"], settings["vision"]) if zero.stage < 3 else 0
    share = needed / seconds / peak(trainer.args.device)
    tokens = settings["text"] + PICTURE + ANSWER
    found.write_text(f"{micro / seconds:.3g}|{micro * tokens / seconds:,.0f}|{share:.1%}|{memory / 2**30:.1f}")


def main(size: Annotated[str, typer.Argument()] = "2b", steps: int = 12, only: str = "") -> None:
    """Print the table for a size: 2b, 4b, 8b or tiny. only: the variants whose names have this in them."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    profile = None if size == "tiny" else params.load().profiles[f"qwen{size}"].sft
    micro = profile.micro_batch_size if profile else 2
    usual = {"checkpointing": True, "vision": True, "features": False, "quantization": None, "attention": "sdpa"}
    usual |= {"fused": True, "micro": micro, "zero": profile.zero.stage if profile else 2}
    usual["text"] = TEXT if profile else 50
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table("", "rows/s", "tokens/s", "of the peak", "memory, GiB", title=f"Qwen3-VL-{size} on {device}")
    with tempfile.TemporaryDirectory() as top:
        folder, found = Path(top), Path(top) / "found"
        devices.launch(build, 1, size, folder / "model", group=True)
        for name, change in variants(micro).items():
            if only not in name:
                continue
            found.unlink(missing_ok=True)
            try:
                devices.launch(measure, 1, size, folder, found, usual | change, steps, group=True)
                table.add_row(name, *found.read_text().split("|"))
            except (WorkError, SystemExit) as error:
                table.add_row(name, f"memory is full or killed ({error})")
            except torch.multiprocessing.ProcessRaisedException as error:
                table.add_row(name, str(error).strip().splitlines()[-1][:60])
    Console(width=140).print(table)
    print("Packing: TRL refuses it for data with pictures.")


def build(size: str, folder: Path) -> None:
    """A model of this size with random weights, as a folder, and the tiny student's processor beside it."""
    from transformers import Qwen3VLForConditionalGeneration

    from apprentice.training import pretraining

    made = config(size)
    with torch.device("meta"):
        count = Qwen3VLForConditionalGeneration(made).num_parameters()
    if size in PARAMETERS and count != PARAMETERS[size]:
        raise WorkError(f"the configuration of {size} makes {count:,} parameters instead of {PARAMETERS[size]:,}")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3VLForConditionalGeneration(made)
    model.save_pretrained(folder)
    shown = params.Prompt(mode="image", rules=False)
    _, seen = pretraining.frames(100_000, 4)
    tokens = tiny.tokenizer(*pretraining.vocabulary(shown, seen), 512)
    torch.set_default_dtype(torch.float32)
    tiny.build(params.Architecture(), tokens, 0)[1].save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)
