"""What the training stages share: rows as tensors, the LoRA settings, checkpoints and curves."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint

from apprentice.conversation import batch, encode, length
from apprentice.dataset import Jsonl
from apprentice.params import Lora


def fitting(path: Path, processor, max_length: int) -> tuple[list[int], list[int]]:
    """The places of a file's rows of at most max_length tokens, and the lengths of the others."""
    lengths = [length(processor, row["messages"]) for row in Jsonl(path)]
    kept = [place for place, tokens in enumerate(lengths) if tokens <= max_length]
    return kept, [tokens for tokens in lengths if tokens > max_length]


class Rows:
    """Chat rows of a JSONL file, encoded when asked for."""

    def __init__(self, path: Path, processor, places: list[int]):
        self.processor, self._rows = processor, Jsonl(path)
        self.dataset = Dataset.from_dict({"row": places}).with_transform(self._encode)
        """What TRL takes; a row is encoded when it is asked for."""

    def _encode(self, chosen: dict) -> dict:
        encoded = [encode(self.processor, self._rows[index]["messages"]) for index in chosen["row"]]
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


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint, None if there is none."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


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
