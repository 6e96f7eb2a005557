"""`apprentice export`: others' trainers can read what it writes, and nothing is lost on the way."""

import base64
import json
import shutil
from pathlib import Path

import pytest
from command_line import run
from datasets import Image, load_dataset
from huggingface_hub import DatasetCard
from jsonschema import Draft202012Validator
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam
from pydantic import TypeAdapter
from ruamel.yaml import YAML
from trl import prepare_multimodal_messages

from apprentice import prompt
from apprentice.cli import export
from apprentice.data import chat_rows
from apprentice.data.dataset import Jsonl, write_jsonl
from apprentice.params import Prompt
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.world import png


def split_rows(top: Path) -> Path:
    """A folder with data/sft, as `split` makes it."""
    episodes = play(Scripted("expert", rationale=True), Spec([0, 1], 12, Prompt()))
    for split, episode, rationale in (("train", episodes[0], False), ("val", episodes[1], True)):
        rows = [chat_rows.row(episode, step, Prompt(history=2), rationale) for step in episode.steps]
        rows[3]["messages"][1]["content"][1]["text"] += " <image>"  # as in an import
        write_jsonl(top / f"data/sft/{split}.jsonl", rows)
    return top


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return split_rows(tmp_path_factory.mktemp("source"))


def picture_of(chat: dict) -> bytes:
    return base64.b64decode(chat["messages"][1]["content"][0]["image_url"]["url"].partition(",")[2])


def exported(source: Path, form: str, out: Path) -> dict:
    done = run(source, "export", form, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_openai_gets_the_chats_and_no_key_that_it_would_refuse(source, tmp_path):
    assert exported(source, "openai", tmp_path / "out")["rows"] == {"train": 12, "val": 12}
    chats = list(Jsonl(source / "data/sft/train.jsonl"))
    rows = list(Jsonl(tmp_path / "out/train.jsonl"))
    assert rows == [{"messages": chat["messages"], "tools": prompt.TOOLS} for chat in chats]
    for key, kind in {"messages": ChatCompletionMessageParam, "tools": ChatCompletionFunctionToolParam}.items():
        schema = TypeAdapter(list[kind]).json_schema()
        for described in schema["$defs"].values():
            described.setdefault("additionalProperties", False)
        read = Draft202012Validator(schema)
        assert all(read.is_valid(row[key]) for row in rows)
        assert not any(read.is_valid([row[key][0] | {"metadata": {}}]) for row in rows)


def test_more_pictures_than_openai_takes_are_a_warning(source, tmp_path, monkeypatch, capsys):
    splits = {split: Jsonl(source / f"data/sft/{split}.jsonl") for split in ("train", "val")}
    monkeypatch.setattr(export, "MOST_PICTURES", 12)
    export._openai(tmp_path, splits)
    assert not capsys.readouterr().err
    monkeypatch.setattr(export, "MOST_PICTURES", 11)
    export._openai(tmp_path, splits)
    assert "val.jsonl has 12 rows with a picture, and OpenAI takes at most 11" in capsys.readouterr().err


def test_the_folder_for_datasets_loads_with_pictures_and_the_same_messages(source, tmp_path):
    exported(source, "huggingface", tmp_path / "out")
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(data) == {"train", "validation"} and len(data["train"]) == 12
    assert data["train"].features["images"].feature == Image()
    for row, chat in zip(data["train"], Jsonl(source / "data/sft/train.jsonl"), strict=True):
        (picture,) = row["images"]
        assert (png.decode(picture_of(chat)) == picture).all()
        assert row["messages"][1]["content"][0] == {"type": "image", "text": None}  # and no key that would be a picture
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][2]["tool_calls"] == chat["messages"][2]["tool_calls"]
        assert row["tools"] == prompt.TOOLS and row["episode_id"] == chat["metadata"]["episode_id"]
    assert not list(tmp_path.glob(".partial*")) and sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


def test_the_chat_template_renders_the_folders_rows_as_ours(source, tmp_path, tiny):
    exported(source, "huggingface", tmp_path / "out")
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="validation")
    for row, chat in zip(data, Jsonl(source / "data/sft/val.jsonl"), strict=True):
        ours = tiny[1].apply_chat_template(chat["messages"], tools=prompt.TOOLS, tokenize=False)
        for messages in (row["messages"], prepare_multimodal_messages(row["messages"], row["images"])):  # TRL's
            assert tiny[1].apply_chat_template(messages, tools=row["tools"], tokenize=False) == ours


def test_the_folders_card_says_what_the_hub_asks_for(source, tmp_path):
    done = run(source, "export", "huggingface", "--out", str(tmp_path / "out"), "--license", "cc-by-4.0")
    assert f"hf upload YOUR_NAME/crafter-decisions {tmp_path / 'out'} --repo-type dataset" in done.stdout
    card = DatasetCard.load(tmp_path / "out/README.md").data
    assert card.license == "cc-by-4.0" and card.task_categories == ["image-text-to-text"]
    assert card.size_categories == ["n<1K"]


def test_axolotl_gets_the_text_that_the_chat_template_gives(source, tmp_path, tiny):
    exported(source, "axolotl", tmp_path / "out")
    for split in ("train", "val"):
        chats = Jsonl(source / f"data/sft/{split}.jsonl")
        for row, chat in zip(Jsonl(tmp_path / f"out/{split}.jsonl"), chats, strict=True):
            ours = tiny[1].apply_chat_template(chat["messages"], tools=prompt.TOOLS, tokenize=False)
            assert tiny[1].apply_chat_template(row["messages"], tokenize=False) == ours
            assert row["images"] == [chat["messages"][1]["content"][0]["image_url"]["url"]]
    settings = YAML(typ="safe").load(tmp_path / "out/train.yaml")
    assert settings["datasets"][0]["path"] == str(tmp_path / "out/train.jsonl")


def test_llama_factory_finds_its_files_and_a_picture_for_each_mark(source, tmp_path):
    exported(source, "llamafactory", tmp_path / "out")
    settings = YAML(typ="safe").load(tmp_path / "out/train.yaml")
    assert settings["template"] == "qwen3_vl_nothink" and settings["dataset_dir"] == str(tmp_path / "out")
    assert (settings["dataset"], settings["eval_dataset"]) == ("crafter_train", "crafter_val")
    described = json.loads((tmp_path / "out/dataset_info.json").read_text())
    assert set(described) == {"crafter_train", "crafter_val"}
    for split in ("train", "val"):
        columns = described[f"crafter_{split}"]["columns"]
        rows = list(Jsonl(tmp_path / "out" / described[f"crafter_{split}"]["file_name"]))
        for row, chat in zip(rows, Jsonl(source / f"data/sft/{split}.jsonl"), strict=True):
            human, answer = row[columns["messages"]]
            assert human["from"] == "human" and human["value"].count("<image>") == len(row["images"]) == 1
            assert (tmp_path / "out" / row["images"][0]).read_bytes() == picture_of(chat)
            assert row["system"] == chat["messages"][0]["content"]
            assert json.loads(row["tools"]) == [prompt.TOOLS[0]["function"]]
            call = {"name": "act", "arguments": {"actions": list(prompt.parse(chat["messages"][2]).actions)}}
            if split == "train":
                assert answer["from"] == "function_call" and json.loads(answer["value"]) == call
            else:  # words and a call: as a model says them
                assert answer["from"] == "gpt" and answer["value"].startswith(chat["messages"][2]["content"])
                assert prompt.parse({"content": answer["value"]}) == prompt.parse(chat["messages"][2])


@pytest.mark.parametrize("form", ["openai", "huggingface", "llamafactory", "axolotl"])
def test_where_nothing_was_held_out_nothing_is_named_to_validate_on(source, tmp_path, form):
    top = tmp_path / "top"
    shutil.copytree(source / "data", top / "data")
    (top / "data/sft/val.jsonl").write_text("")  # as with split.val_fraction: 0
    out = tmp_path / "out"
    assert exported(top, form, out)["rows"] == {"train": 12}
    assert not list(out.rglob("*val*"))
    for file in (out / "train.yaml", out / "README.md"):
        if file.is_file():
            assert "val" not in file.read_text().partition("\n---\n")[0].replace("evaluation", "")
    if form == "huggingface":
        assert set(load_dataset(str(out), cache_dir=str(tmp_path / "cache"))) == {"train"}
    if form in ("llamafactory", "axolotl"):
        assert YAML(typ="safe").load(out / "train.yaml")


def test_nothing_is_overwritten_and_nothing_half_done_is_left(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    done = run(source, "export", "openai", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "give another --out" in done.stderr
    done = run(tmp_path, "export", "openai")
    assert done.returncode == 2 and "there is no data/sft/train.jsonl" in done.stderr


BROKEN = {"no JSON": "{broken", "no object": "[]", "no chat": "{}", "no picture": None}


@pytest.mark.parametrize("form", ["openai", "huggingface", "llamafactory", "axolotl"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_line_is_named_and_nothing_is_left(source, tmp_path, form, what):
    if what == "no picture" and form == "openai":
        pytest.skip("pictures are passed on as they are")
    lines = (source / "data/sft/train.jsonl").read_text().splitlines()
    lines[1] = BROKEN[what] or lines[1].replace("data:image/png;base64,", "data:image/png;base64,%")
    (tmp_path / "data/sft").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"data/sft/{split}.jsonl").write_text("\n".join(lines))
    done = run(tmp_path, "export", form)
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if line and "row/s" not in line]
    assert said.startswith("data/sft/train.jsonl, line 2, is no row") and said.endswith("dvc repro -f -s split")
    assert not list((tmp_path / "exports").iterdir())
