"""BALROG's own evaluator asks `apprentice serve`, by the agent that `apprentice export balrog` writes.

Run by `make test-balrog BALROG=FOLDER`, which sets up the evaluator's environment; not part of `make test`. FOLDER is a
checkout of github.com/balrog-ai/BALROG, which no registry has. It's copied, and stays as it is.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from command_line import run
from small import checkout

from apprentice.pipeline import ROOT


def test_balrogs_evaluator_plays_the_student(tiny_folder, tmp_path):
    """The untrained one: what it says is no action mostly, which is BALROG's to count."""
    top = checkout(tmp_path / "top", {})
    (top / "models").mkdir()
    (top / "models/base").symlink_to(tiny_folder)
    theirs = tmp_path / "BALROG"
    shutil.copytree(os.environ["BALROG"], theirs, ignore=shutil.ignore_patterns(".git", "results"))
    assert run(top, "export", "balrog", "--out", str(tmp_path / "agent")).returncode == 0
    shutil.copy(tmp_path / "agent/custom.py", theirs / "balrog/agents/custom.py")
    command = [sys.executable, "-m", "apprentice.cli", "serve", "base", "--port", "0"]
    serving = subprocess.Popen(command, cwd=top, stdout=subprocess.PIPE, text=True)
    try:
        url = serving.stdout.readline().split()[2]
        asked = "agent.type=custom envs.names=crafter envs.crafter_kwargs.size=[72,72] eval.num_workers=2"
        asked += f" client.client_name=vllm client.model_id=base client.base_url={url} client.max_retries=1"
        asked += " eval.num_episodes.crafter=2 eval.max_steps_per_episode=8 eval.output_dir=found"
        python = ROOT / ".venv-balrog/bin/python"
        done = subprocess.run(
            [python, "eval.py", *asked.split()], cwd=theirs, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
    finally:
        serving.send_signal(signal.SIGINT)
        serving.wait(30)
    (found,) = Path(theirs / "found").iterdir()
    assert json.loads((found / "summary.json").read_text())["environments"]["crafter"]["episodes_played"] == 2
    for file in sorted((found / "crafter/default").glob("*.json")):
        episode = json.loads(file.read_text())
        assert episode["num_steps"] == 8 and sum(episode["action_frequency"].values()) == 8
        assert episode["input_tokens"] > 8 * 81  # a picture each
