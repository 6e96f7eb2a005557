"""What a trainer makes of an exported folder, as JSON: run by with_trainers.py, in the trainer's own environment.

Arguments: the form, the folder, the split, a folder with the student, the file to write. A row is {"input_ids",
"labels"}; labels, if the trainer makes them, are -100 where nothing is learnt.
"""

import json
import sys
import tempfile
import types
from pathlib import Path


def huggingface(folder: Path, split: str, student: str) -> list[dict]:
    from datasets import load_dataset
    from transformers import AutoProcessor

    processor, rows = AutoProcessor.from_pretrained(student), []
    for row in load_dataset(str(folder), split={"train": "train", "val": "validation"}[split]):
        text = processor.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
        rows.append({"input_ids": processor(text=[text], images=row["images"])["input_ids"][0]})
    return rows


def llamafactory(folder: Path, split: str, student: str) -> list[dict]:
    import transformers  # noqa: F401  (it looks for torchaudio itself, and is not to find that)
    import yaml

    # LLaMA-Factory imports it for sound, which nothing has here. There is none for a CPU build of torch.
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    settings = yaml.safe_load((folder / "train.yaml").read_text())
    changed = {"model_name_or_path": student, "output_dir": tempfile.mkdtemp(), "report_to": "none", "use_cpu": True}
    model, data, training, _, _ = get_train_args(settings | changed)
    loaded = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data)
    found = get_dataset(template, model, data, training, stage="sft", **loaded)
    return list(found["train_dataset" if split == "train" else "eval_dataset"])


def axolotl(folder: Path, split: str, student: str) -> list[dict]:
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.loaders import load_processor, load_tokenizer
    from axolotl.processing_strategies import get_processing_strategy
    from axolotl.utils.chat_templates import get_chat_template_from_config
    from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator

    out = tempfile.mkdtemp()
    cfg = load_cfg(str(folder / "train.yaml"), base_model=student, output_dir=out, bf16=False)
    found = load_datasets(cfg=cfg)
    tokenizer = load_tokenizer(cfg)
    strategy = get_processing_strategy(
        load_processor(cfg, tokenizer=tokenizer),
        get_chat_template_from_config(cfg, tokenizer=tokenizer),
        cfg.chat_template,
        model_type=cfg.model_config_type,
    )
    collator, rows = MultiModalChatDataCollator(tokenizer, strategy), []
    for row in found.train_dataset if split == "train" else found.eval_dataset:
        batch = collator([row])
        rows.append({name: batch[name][0].tolist() for name in ("input_ids", "labels")})
    return rows


if __name__ == "__main__":
    form, folder, split, student, out = sys.argv[1:]
    read = {"huggingface": huggingface, "llamafactory": llamafactory, "axolotl": axolotl}[form]
    rows = [
        {name: [int(token) for token in row[name]] for name in ("input_ids", "labels") if name in row}
        for row in read(Path(folder), split, student)
    ]
    Path(out).write_text(json.dumps(rows))
