"""`apprentice export`: the student's training data in the forms that others' trainers read.

`make test-exports` has the trainers read them.
"""

import base64
import hashlib
import json
import re
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from apprentice.errors import ConfigError, WorkError
from apprentice.files import replacing

if TYPE_CHECKING:
    from apprentice.data.dataset import Jsonl

Format = Literal["openai", "huggingface", "llamafactory", "axolotl", "balrog"]
SPLITS = {"train": "train", "val": "validation"}
MOST_PICTURES = 50_000
"""Rows with a picture that OpenAI's fine-tuning takes in a file."""
_PLACE = re.compile("<(image|video|audio)>")
_CARD = """\
---
pretty_name: Decisions in Crafter
license: {license}
language: [en]
task_categories: [image-text-to-text]
size_categories: [{size}]
tags: [crafter, imitation-learning, tool-use]
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: validation
    path: data/validation-*.parquet
---
Decisions in [Crafter](https://github.com/danijar/crafter), one a row: what a teacher was shown (`messages` and
`images`, in TRL's form), the `tools`, and the teacher's call as the last message. It needs datasets 4.0 or newer. Made
by `apprentice export`.
"""
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
_SETTINGS = {
    "llamafactory": """\
# llamafactory-cli train train.yaml
model_name_or_path: Qwen/Qwen3-VL-2B-Instruct
template: qwen3_vl_nothink # qwen3_vl would teach an empty thought before each call
dataset_dir: {folder}
dataset: crafter_train
eval_dataset: crafter_val
cutoff_len: 8192 # longer rows are cut without a word
stage: sft
do_train: true
finetuning_type: lora
output_dir: saves/crafter
""",
    "axolotl": """\
# axolotl train train.yaml
base_model: Qwen/Qwen3-VL-2B-Instruct
processor_type: AutoProcessor
chat_template: qwen2_vl # gives these rows as Qwen3-VL's own does; by that one all turns would be learnt, not the answer
datasets: [{{path: {train}, ds_type: json, type: chat_template}}]
test_datasets: [{{path: {val}, ds_type: json, type: chat_template, split: train}}]
skip_prepare_dataset: true # this and the next two are what pictures need
remove_unused_columns: false
sample_packing: false
sequence_len: 8192
adapter: lora
lora_r: 16
lora_alpha: 16
lora_target_linear: true
micro_batch_size: 4
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_torch
learning_rate: 0.0001
output_dir: saves/crafter
""",
}
"""The train.yaml of a trainer: what these files need, and a start for the rest."""
_HELD_OUT = re.compile(r"^(eval_dataset|test_datasets):.*\n|^  - split: validation\n.*\n", re.MULTILINE)
"""What a train.yaml and the card say of rows to validate on."""
_NEXT = {
    "huggingface": "hf upload YOUR_NAME/crafter-decisions {out} --repo-type dataset",
    "llamafactory": "llamafactory-cli train {out}/train.yaml",
    "axolotl": "axolotl train {out}/train.yaml",
}


def export(
    form: Annotated[
        Format,
        typer.Argument(
            metavar="FORMAT",
            help="openai: JSONL for its fine-tuning API. huggingface: a folder for datasets.load_dataset, with a card. "
            "llamafactory: its dataset_info.json and files, and a train.yaml. axolotl: JSONL with tools and call as "
            "text, and a train.yaml; for it and others that leave out tool_calls without a word. "
            "balrog: no data, but an agent for its evaluator.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder to make; otherwise exports/FORMAT.")] = None,
    source: Annotated[Path, typer.Option("--from", help="Where train.jsonl and val.jsonl are.")] = Path("data/sft"),
    license_: Annotated[
        str, typer.Option("--license", help="For huggingface's card. Imported rows have their authors'.")
    ] = "mit",
    as_json: Annotated[bool, typer.Option("--json", help="What was written, for a script.")] = False,
) -> None:
    """Write the training data, split as it is, for another trainer; or for BALROG's evaluator who asks the student.

    Example: apprentice export llamafactory --out ~/LLaMA-Factory/data/crafter
    """
    out = out or Path("exports") / form
    if form == "balrog":
        return _balrog(out)
    files = {split: source / f"{split}.jsonl" for split in SPLITS}
    for file in files.values():
        if not file.is_file():
            raise ConfigError(f"there is no {file}; make it by dvc repro split, or dvc pull it, or name another --from")
    _free(out)

    from apprentice.data.dataset import Jsonl

    write = {"openai": _openai, "huggingface": _huggingface, "llamafactory": _llamafactory, "axolotl": _axolotl}[form]
    chats = {split: Jsonl(file) for split, file in files.items()}
    if not len(chats["val"]):  # split.val_fraction: 0
        del chats["val"]

    def text(form: str, **values: str) -> str:
        return (form if "val" in chats else _HELD_OUT.sub("", form)).format(**values)

    with replacing(out) as folder:
        folder.mkdir()
        counts = write(folder, chats)
        if form == "huggingface":
            size = next((name for most, name in _SIZES.items() if sum(counts.values()) < most), "n>10M")
            (folder / "README.md").write_text(text(_CARD, license=license_, size=size))
        if form in _SETTINGS:
            places = {"folder": out, **{split: out / f"{split}.jsonl" for split in SPLITS}}
            # JSON's texts are YAML's.
            quoted = {name: json.dumps(str(place.resolve())) for name, place in places.items()}
            (folder / "train.yaml").write_text(text(_SETTINGS[form], **quoted))
    if as_json:
        print(json.dumps({"format": form, "folder": str(out), "rows": counts}))
        return
    print(f"{out}: " + ", ".join(f"{count} rows of {SPLITS[split]}" for split, count in counts.items()))
    if form in _NEXT:
        print("next: " + _NEXT[form].format(out=shlex.quote(str(out))))


def _free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not empty; remove it, or give another --out")


def _balrog(out: Path) -> None:
    from apprentice import params
    from apprentice.cli import balrog

    _free(out)
    with replacing(out) as folder:
        folder.mkdir()
        balrog.write(folder, params.load().active.prompt)
    print(f"{out}/custom.py: copy it over balrog/agents/custom.py of BALROG; it says how to run the evaluator")


def _rows(chats: "Jsonl", row_of: Callable[[dict], dict]) -> Iterator[dict]:
    """Each chat as the row that is wanted of it. Raises WorkError with the line that is no chat."""
    from tqdm import tqdm

    for place in tqdm(range(len(chats)), unit="row", mininterval=1, disable=None):
        try:
            row = row_of(chats[place])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise WorkError(
                f"{chats.path}, line {place + 1}, is no row of the pipeline's ({type(error).__name__}: {error}); "
                "make it anew: dvc repro -f -s split"
            ) from None
        yield row


def _openai(out: Path, splits: dict[str, "Jsonl"]) -> dict[str, int]:
    """Nothing but what the fine-tuning API knows: it refuses a file with other keys."""
    from apprentice.data.dataset import write_jsonl

    pictures: Counter[str] = Counter()

    def row(chat: dict) -> dict:
        contents = [message["content"] for message in chat["messages"] if isinstance(message["content"], list)]
        pictures[split] += any(part["type"] == "image_url" for content in contents for part in content)
        return {"messages": chat["messages"], "tools": chat["tools"]}

    counts = {}
    for split, chats in splits.items():
        counts[split] = write_jsonl(out / f"{split}.jsonl", _rows(chats, row))
        if pictures[split] > MOST_PICTURES:
            print(
                f"warning: {split}.jsonl has {pictures[split]:,} rows with a picture, and OpenAI takes at most "
                f"{MOST_PICTURES:,} in a file: upload a part of its lines (head -n {MOST_PICTURES})",
                file=sys.stderr,
            )
    return counts


def _huggingface(out: Path, splits: dict[str, "Jsonl"]) -> dict[str, int]:
    """Types that datasets 4.0 knows: its Json came with 4.7, which LLaMA-Factory and Unsloth exclude.

    In a struct every key is in every row, as null where it was missing. A chat template passes over these nulls: only
    the mere key `image` or `video` in a part would count as a picture, so no part has one.
    """
    from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
    from datasets.exceptions import DatasetGenerationError

    from apprentice import prompt

    text = Value("string")
    call = {"id": text, "type": text, "function": {"name": text, "arguments": text}}
    features = Features(
        {
            "messages": List({"role": text, "content": List({"type": text, "text": text}), "tool_calls": List(call)}),
            "images": List(Image()),
            "tools": Dataset.from_dict({"tools": [prompt.TOOLS]}).features["tools"],
            "episode_id": Value("string"),
            "step": Value("int32"),
            "seed": Value("int64"),
            "teacher": Value("string"),
            "model": Value("string"),
        }
    )

    def row(chat: dict) -> dict:
        messages, pngs = _without_pictures(chat["messages"])
        known = {name: chat["metadata"].get(name) for name in ("episode_id", "step", "seed", "teacher", "model")}
        images = [{"bytes": png, "path": None} for png in pngs]
        parted = [message | {"content": _parts(message["content"])} for message in messages]
        return {"messages": parted, "images": images, "tools": chat["tools"], **known}

    disable_progress_bars()
    counts = {}
    (out / "data").mkdir()
    for split, chats in splits.items():
        with tempfile.TemporaryDirectory(dir=out.parent) as cache:
            asked = {"chats": chats, "row_of": row}
            try:
                data = Dataset.from_generator(_rows, features=features, gen_kwargs=asked, cache_dir=cache)
            except DatasetGenerationError as error:
                raise error.__cause__ or error from None
            data.to_parquet(out / "data" / f"{SPLITS[split]}-00000-of-00001.parquet")
            counts[split] = len(data)
            del data
    return counts


def _llamafactory(out: Path, splits: dict[str, "Jsonl"]) -> dict[str, int]:
    """LLaMA-Factory's sharegpt form (`data/README.md` and `converter.py` there), a picture a file.

    Its media_dir is the folder of dataset_info.json, if dataset_dir is.
    """
    from apprentice.data.dataset import write_jsonl

    (out / "images").mkdir()

    def row(chat: dict) -> dict:
        messages, pngs = _without_pictures(chat["messages"])
        names = [f"images/{hashlib.sha256(png).hexdigest()[:24]}.png" for png in pngs]
        for name, png in zip(names, pngs, strict=True):
            if not (out / name).exists():
                (out / name).write_bytes(png)
        return {
            "conversations": [_turn(message) for message in messages if message["role"] != "system"],
            "system": "\n".join(_words(message) for message in messages if message["role"] == "system"),
            "tools": json.dumps([tool["function"] for tool in chat["tools"]]),
            "images": names,
        }

    counts, described = {}, {}
    for split, chats in splits.items():
        counts[split] = write_jsonl(out / f"{split}.jsonl", _rows(chats, row))
        described[f"crafter_{split}"] = {
            "file_name": f"{split}.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": "system", "tools": "tools", "images": "images"},
        }
    (out / "dataset_info.json").write_text(json.dumps(described, indent=2) + "\n")
    return counts


def _axolotl(out: Path, splits: dict[str, "Jsonl"]) -> dict[str, int]:
    """Axolotl gives a chat template no tools, and leaves out a message without content: both are text here.

    The words are those of Qwen3-VL's chat template, so that who asks with the tools shows the model what it has learnt.
    Contents are lists of parts of the same keys, since a column has one type. A picture is a data: URL under `images`.
    """
    from apprentice import prompt
    from apprentice.data.dataset import write_jsonl

    def row(chat: dict) -> dict:
        messages, pngs = _without_pictures(chat["messages"])
        *before, user, answer = messages
        system = _with_tools(before[0]["content"] if before else "", json.dumps(chat["tools"]))
        contents = {"system": system, "user": user["content"], "assistant": prompt.spoken(answer)}
        return {
            "messages": [{"role": role, "content": _parts(content)} for role, content in contents.items()],
            "images": ["data:image/png;base64," + base64.b64encode(png).decode() for png in pngs],
        }

    return {split: write_jsonl(out / f"{split}.jsonl", _rows(chats, row)) for split, chats in splits.items()}


@cache
def _with_tools(system: str, tools: str) -> str:
    """A system prompt, with the tools described as Qwen3-VL's chat template does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from apprentice.student.template import TEMPLATE

    chat = [{"role": "system", "content": system}] if system else []
    chats = [[*chat, {"role": "user", "content": ""}]]
    text = render_jinja_template(chats, json.loads(tools), chat_template=TEMPLATE)[0][0]
    return text.removeprefix("<|im_start|>system\n").partition("<|im_end|>")[0]


def _parts(content: str | list[dict] | None) -> list[dict]:
    """A message's content as a list, empty where it has none."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


def _turn(message: dict) -> dict[str, str]:
    words = _words(message)
    if message["role"] == "user":
        return {"from": "human", "value": words}
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    asked = [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls]
    if not calls:
        return {"from": "gpt", "value": words}
    if not words:
        return {"from": "function_call", "value": json.dumps(asked[0] if len(asked) == 1 else asked)}
    from apprentice import prompt

    # It has no turn for words and a call: both as the model will say them.
    return {"from": "gpt", "value": prompt.spoken(message | {"content": words})}


def _words(message: dict) -> str:
    """The text; `<image>` where a picture is, and nowhere else: that, `<video>` and `<audio>` are taken for places."""
    parts = _parts(message["content"])
    return "".join("<image>" if part["type"] == "image" else _PLACE.sub(r"[\1]", part["text"]) for part in parts)


def _without_pictures(messages: list[dict]) -> tuple[list[dict], list[bytes]]:
    """The messages with {"type": "image"} in the pictures' places, and the pictures' bytes."""
    pngs: list[bytes] = []

    def part_of(part: dict) -> dict:
        if part["type"] != "image_url":
            return part
        pngs.append(base64.b64decode(part["image_url"]["url"].partition(",")[2], validate=True))
        return {"type": "image"}

    found = [
        message | {"content": [part_of(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    return found, pngs
