"""`apprentice export`: the student's training data in the forms that others' trainers read."""

import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from apprentice.errors import ConfigError, WorkError
from apprentice.files import replacing

if TYPE_CHECKING:
    from apprentice.data.dataset import Jsonl

Format = Literal["openai", "huggingface", "llamafactory", "balrog"]
SPLITS = {"train": "train", "val": "validation"}
_PLACE = re.compile("<(image|video|audio)>")
_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: validation
    path: data/validation-*.parquet
---
Decisions in [Crafter](https://github.com/danijar/crafter), one a row: what a teacher was shown (`messages` and
`images`, in TRL's form), the `tools`, and the teacher's call as the last message. Made by `apprentice export`.
"""


def export(
    form: Annotated[
        Format,
        typer.Argument(
            metavar="FORMAT",
            help="openai: JSONL for its fine-tuning API. huggingface: a folder for datasets.load_dataset. "
            "llamafactory: its dataset_info.json and files. balrog: no data, but an agent for its evaluator.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder to make; otherwise exports/FORMAT.")] = None,
    source: Annotated[Path, typer.Option("--from", help="Where train.jsonl and val.jsonl are.")] = Path("data/sft"),
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

    write = {"openai": _openai, "huggingface": _huggingface, "llamafactory": _llamafactory}[form]
    with replacing(out) as folder:
        folder.mkdir()
        counts = write(folder, {split: Jsonl(file) for split, file in files.items()})
    if as_json:
        print(json.dumps({"format": form, "folder": str(out), "rows": counts}))
    else:
        print(f"{out}: " + ", ".join(f"{count} rows of {SPLITS[split]}" for split, count in counts.items()))


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

    def row(chat: dict) -> dict:
        return {"messages": chat["messages"], "tools": chat["tools"]}

    return {split: write_jsonl(out / f"{split}.jsonl", _rows(chats, row)) for split, chats in splits.items()}


def _huggingface(out: Path, splits: dict[str, "Jsonl"]) -> dict[str, int]:
    """Messages and tools as JSON columns: as structs, every key of one would be in all, as null, and a chat template
    takes a part with an `image` of null for a picture."""
    from datasets import Dataset, Features, Image, Json, List, Value, disable_progress_bars
    from datasets.exceptions import DatasetGenerationError

    features = Features(
        {
            "messages": List(Json()),
            "images": List(Image()),
            "tools": List(Json()),
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
        return {"messages": messages, "images": images, "tools": chat["tools"], **known}

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
    (out / "README.md").write_text(_CARD)
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
    content = message["content"] or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
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
