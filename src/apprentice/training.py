"""What the training stages share: rows as tensors, the LoRA settings, checkpoints and curves."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint

from apprentice.conversation import batch, encode
from apprentice.dataset import Jsonl
from apprentice.params import Lora


class Rows:
    """Chat rows of a JSONL file, encoded when asked for; those longer than max_length tokens are left out."""

    def __init__(self, path: Path, processor, max_length: int):
        self.processor, self._rows = processor, Jsonl(path)
        lengths = [_length(processor, row["messages"]) for row in self._rows]
        kept = [index for index, length in enumerate(lengths) if length <= max_length]
        self.shortest, self.too_long = min(lengths, default=0), len(lengths) - len(kept)
        self.dataset = Dataset.from_dict({"row": kept}).with_transform(self._encode)
        """What TRL takes; a row is encoded when it is asked for."""

    def _encode(self, chosen: dict) -> dict:
        encoded = [encode(self.processor, self._rows[index]["messages"]) for index in chosen["row"]]
        # TRL takes the data set for one with pictures if a row has the key `images`.
        return {"images": [row.image_grid_thw for row in encoded], "encoded": encoded}

    def collate(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Model inputs and labels. TRL's own collator for VLMs would leave the tools out of the prompt."""
        return batch(self.processor, [row["encoded"] for row in rows])


def _length(processor, messages: list[dict]) -> int:
    """Tokens of a row, those of its pictures included."""
    encoded = encode(processor, messages)
    return len(encoded.prompt_ids) + len(encoded.answer_ids)


def lora_config(lora: Lora) -> LoraConfig:
    targets = lora.target_modules
    return LoraConfig(
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
