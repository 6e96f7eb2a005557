"""What the training stages share: rows as tensors, the LoRA settings, checkpoints and curves."""

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from apprentice import student
from apprentice.conversation import batch, encode_all, length
from apprentice.dataset import Jsonl
from apprentice.ledger import cache
from apprentice.params import Lora, Sft, Zero
from apprentice.processes import in_processes


@dataclass(frozen=True)
class Survey:
    """What is known of a file's rows without encoding them."""

    places: np.ndarray
    """int64 (rows,): the byte at which each begins."""
    lengths: np.ndarray
    """int32 (rows,): tokens."""
    teachers: list[dict]
    """Who taught them: teacher, model, rows and episodes of each."""


def survey(path: Path, base: Path, name: str) -> Survey:
    """Go through a file's rows once, on all cores; the result is kept in the user's cache.

    base: the folder of the student's base model. name: names all that the result depends on.
    """
    folder = cache() / "rows"
    rows, teachers = folder / f"{name}.npy", folder / f"{name}.json"
    if not rows.exists():
        size = path.stat().st_size
        calls = [(path, base, first, min(first + _PART, size)) for first in range(0, size, _PART)]
        # To start processes takes longer than to go through a small file.
        found = in_processes(_survey_part, calls) if size > _ALONE else (_survey_part(*call) for call in calls)
        parts = list(tqdm(found, path.name, len(calls), unit="part", mininterval=1))
        parts.sort(key=lambda part: part[0])
        counts, episodes = Counter(), defaultdict(set)
        for _, _, counted, seen in parts:
            counts += counted
            for key, ids in seen.items():
                episodes[key] |= ids
        known = [
            {"teacher": teacher, "model": model, "rows": counts[teacher, model], "episodes": len(ids)}
            for (teacher, model), ids in sorted(episodes.items(), key=str)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        teachers.write_text(json.dumps(known))
        partial = rows.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, np.concatenate([part[1] for part in parts]) if parts else np.empty(0, _ROW))
        partial.replace(rows)
    table = np.load(rows, mmap_mode="r")
    return Survey(table["place"], table["tokens"], json.loads(teachers.read_text()))


_PART = 16 << 20
_ALONE = 256 << 20
_ROW = np.dtype([("place", np.int64), ("tokens", np.int32)])


def _survey_part(path: Path, base: Path, first: int, last: int) -> tuple[int, np.ndarray, Counter, dict]:
    """Of the lines that begin in bytes first to last: first, the rows, their number and episodes by teacher."""
    processor, rows, counts, episodes = _processor(base), [], Counter(), defaultdict(set)
    with path.open("rb") as file:
        file.seek(max(0, first - 1))
        place = first + len(file.readline()) - 1 if first else 0
        while place < last:
            line = file.readline()
            row = json.loads(line)
            rows.append((place, length(processor, row["messages"])))
            teacher = row["metadata"]["teacher"], row["metadata"]["model"]
            counts[teacher] += 1
            episodes[teacher].add(row["metadata"]["episode_id"])
            place += len(line)
    return first, np.array(rows, _ROW), counts, episodes


_processor = lru_cache(student.processor)


class Rows:
    """Chat rows of a JSONL file, encoded when asked for."""

    def __init__(self, path: Path, processor, places: np.ndarray, chosen: np.ndarray):
        """places: where each row begins. chosen: which rows, in the order in which they are to be given."""
        self.processor, self._rows = processor, Jsonl(path, places)
        self.dataset = Dataset.from_dict({"row": chosen}).with_transform(self._encode)
        """What TRL takes; a row is encoded when it is asked for."""

    def _encode(self, chosen: dict) -> dict:
        encoded = encode_all(self.processor, [self._rows[index]["messages"] for index in chosen["row"]])
        # TRL takes the data set for one with pictures if a row has the key `images`.
        return {"images": [row.image_grid_thw for row in encoded], "encoded": encoded}

    def collate(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Model inputs and labels. TRL's own collator for VLMs would leave the tools out of the prompt."""
        return batch(self.processor, [row["encoded"] for row in rows])


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


def zero_config(zero: Zero) -> dict | None:
    """DeepSpeed's form of the settings, for the `deepspeed` of a trainer's arguments; None is without DeepSpeed.

    To be called in a rank.
    "auto" is what the trainer's arguments say. Make those before the model is loaded: with stage 3 each rank then
    loads its part only.
    """
    if not zero.stage:
        return None
    if not torch.cuda.is_available():
        import deepspeed

        # Its own reduction in shared memory would first be compiled, for a minute; gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)  # on GPUs accelerate does it
    division = {"stage": zero.stage, "contiguous_gradients": True, "overlap_comm": torch.cuda.is_available()}
    if zero.stage == 3:
        division["stage3_gather_16bit_weights_on_model_save"] = True
    if zero.offload:
        place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        division |= {name: place for name in ("offload_optimizer", "offload_param")[: zero.stage - 1]}
    return {
        "zero_optimization": division,
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # torch's AdamW, as without DeepSpeed, whose own would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def relief(where: str, sft: Sft) -> str:
    """The settings that would help when memory is full, what costs least first. where: the section's place."""
    steps = [
        (sft.micro_batch_size > 1, f"micro_batch_size: {sft.micro_batch_size // 2} (the batch stays {sft.batch_size})"),
        (not sft.gradient_checkpointing, "gradient_checkpointing: true"),
        (sft.lora.quantization is None and sft.zero.stage < 3, "lora.quantization: nf4"),
        (True, f"max_length below {sft.max_length} (longer rows are left out)"),
        (sft.lora.vision, "lora.vision: false"),
        (sft.zero.stage < 2, "zero.stage: 2"),
        (sft.zero.stage < 3 and sft.lora.quantization is None, "zero.stage: 3"),
        (not sft.zero.offload, "zero.offload: true"),
    ]
    return f"What helps, in this order, under {where}: {', '.join(step for helps, step in steps if helps)}"


class Whole(TrainerCallback):
    """Marks a checkpoint when every rank has written its part; one that a kill cut short has no mark."""

    def on_save(self, args, state, control, **kwargs) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / _WHOLE).touch()


_WHOLE = "whole"


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint, None if there is none."""
    marks = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_WHOLE}")
    found = sorted((mark.parent for mark in marks), key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))
    return str(found[-1]) if found else None


def write_curve(path: Path, history: list[dict], columns: dict[str, str]) -> None:
    """The rows of a trainer's log that have all of these keys, as a CSV that DVC plots.

    columns: key in the log → name of the column.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *columns.values()])
        for entry in history:
            if columns.keys() <= entry.keys():
                writer.writerow([entry["step"], *(f"{entry[key]:.6g}" for key in columns)])
