"""Others' trainers read what `apprentice export` writes for them, each in its own environment.

Run by `make test-exports`, which sets them up; not part of `make test`.
"""

import json
import os
import subprocess

import pytest
from command_line import run
from test_export_command import split_rows

from apprentice.data.dataset import Jsonl
from apprentice.pipeline import ROOT
from apprentice.student import encoding

READER = ROOT / "tests/cli/trainer_reads.py"
ENVIRONMENTS = {"huggingface": "llamafactory", "llamafactory": "llamafactory", "axolotl": "axolotl"}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("form", ENVIRONMENTS)
def test_a_trainer_sees_the_tokens_that_we_see_and_learns_the_answer_alone(tiny, tiny_folder, tmp_path, form, split):
    source = split_rows(tmp_path / "source")
    assert run(source, "export", form, "--out", str(tmp_path / "out")).returncode == 0
    python = ROOT / f".venv-{ENVIRONMENTS[form]}/bin/python"
    offline = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    arguments = [form, tmp_path / "out", split, tiny_folder, tmp_path / "rows.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    done = subprocess.run(
        [python, READER, *map(str, arguments)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    tokenizer = tiny[1].tokenizer
    chats = [chat["messages"] for chat in Jsonl(source / f"data/sft/{split}.jsonl")]
    if form == "llamafactory":  # takes the text <image> for a picture, so it's written otherwise
        chats = json.loads(json.dumps(chats).replace("<image>", "[image]"))
    ours = [encoding.encode(tiny[1], chat) for chat in chats]
    # A trainer may shuffle.
    ours.sort(key=lambda encoded: encoded.prompt_ids + encoded.answer_ids)
    rows.sort(key=lambda row: row["input_ids"])
    for row, encoded in zip(rows, ours, strict=True):
        shown, said = len(encoded.prompt_ids), encoded.prompt_ids + encoded.answer_ids
        assert row["input_ids"][: len(said)] == said
        assert tokenizer.decode(row["input_ids"][len(said) :]).strip() == ""
        if form != "huggingface":
            assert set(row["labels"][:shown]) == {-100} and row["labels"][shown : len(said)] == encoded.answer_ids
