"""`make test-docs`: README's and docs' commands are run as they stand there, in a copy with `make smoke`'s results.

Where the copy lacks what a page speaks of, a word is replaced by one that it has (`INSTEAD`). Experiments go as far as
the stage `settings`, which checks them. What is not run is named in `NOT_RUN`, with the reason.
"""

import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from documented import OTHERS, Command, commands
from small import environment
from smoke import repro

from apprentice.pipeline import ROOT

INSTEAD = {
    "200003,200040": "200001,200002",
    "expert-12": "expert-2",
    "collect@gpt_4o_mini": "collect@expert",
    "gpt_4o_mini": "expert",
    "FORMAT": "openai",
    "FOLDER": "exported",
    "OUT": "merged",
    "0-99": "0-3",
}
NOT_RUN = {
    "make": "CI runs the targets; they set up environments",
    "pre-commit": "changes git's hooks",
    "apprentice --install-completion": "changes the shell's start-up file",
    "apprentice launch": "needs SkyPilot: make test-sky launches",
    "dvc remote": "tests/on_s3.py does it, on a server of its own",
    "dvc push": "as above",
    "dvc plots show": "tests/test_pipeline.py does it",
    "python benchmarks/": "takes minutes, by hand",
    "python -m pytest": "a test",
    **dict.fromkeys(OTHERS, "no program of ours"),
}
SHOWN = {command.words: command for command in commands() if not command.inline}


def why_not(command: Command) -> str | None:
    line = " ".join(command.words)
    return next((why for start, why in NOT_RUN.items() if f"{line} ".startswith(f"{start} ".replace("/ ", "/"))), None)


RUN = [command for command in SHOWN.values() if why_not(command) is None]


@pytest.fixture(scope="module")
def top(tmp_path_factory) -> Path:
    """The copy, with its first commit and the files that docs/data.md speaks of."""
    folder = tmp_path_factory.mktemp("docs")
    found = repro(folder)
    shutil.copy(found / "data/sft/train.jsonl", found / "chats.jsonl")
    other = folder / "other/data/traces"
    other.mkdir(parents=True)
    shutil.copy(found / "data/traces/expert.parquet", other / "expert.parquet")
    for command in (["add", "--all"], ["commit", "--quiet", "--message", "first"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command], cwd=found, check=True)
    return found


@pytest.fixture
def variables(top) -> dict[str, str]:
    return environment(top.parent / "cache") | {"PYTHONPATH": str(top / "src"), "BROWSER": "true"}


@pytest.mark.parametrize("command", RUN, ids=str)
def test_a_command_does_what_it_says(command, top, variables):
    words = [re.sub("|".join(map(re.escape, INSTEAD)), lambda found: INSTEAD[found[0]], word) for word in command.words]
    programs = {"apprentice": [sys.executable, "-m", "apprentice"], "dvc": [sys.executable, "-m", "dvc"]}
    line = [*programs.get(words[0], [sys.executable]), *words[1:]]
    if words[:2] == ["apprentice", "serve"]:
        return serves(line, top, variables)
    params = (top / "params.yaml").read_bytes()
    if words[:3] == ["dvc", "exp", "run"]:  # the stage that reads the settings, in a copy, with those a newcomer has
        shutil.copy(ROOT / "params.yaml", top)
        line += ["settings"] if "--queue" in words else ["--temp", "settings"]
    done = subprocess.run(
        line, cwd=top, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    (top / "params.yaml").write_bytes(params)
    said = done.stdout + done.stderr
    if words[:3] == ["apprentice", "play", "me"]:
        assert done.returncode == 2 and "needs a terminal" in said
    elif words[:2] == ["apprentice", "doctor"]:
        assert done.returncode in (0, 1) and "cores" in said
    else:
        assert done.returncode == 0, said[-2000:]


def serves(line: list[str], top: Path, variables: dict[str, str]) -> None:
    if "--port" not in line:
        line = [*line, "--port", "0"]
    process = subprocess.Popen(line, cwd=top, env=variables, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://[\w.:]+", process.stdout.readline())[0]
        with urllib.request.urlopen(f"{address}/openapi.json", timeout=60) as answer:
            assert answer.status == 200
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_most_of_ours_are_run():
    ours = [command for command in SHOWN.values() if command.words[0] in ("apprentice", "dvc")]
    assert len([command for command in ours if why_not(command) is None]) > 0.7 * len(ours)
