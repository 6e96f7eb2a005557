"""DVC's experiments, as their users run them: a stage computes with the code of its own checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from small import checkout, environment, yaml

from apprentice import store
from apprentice.pipeline import ROOT


def run(top: Path, cache: Path, *command: str, installed: Path = ROOT) -> str:
    """What a command prints in this checkout. installed: the checkout whose package Python finds by itself."""
    variables = environment(cache) | {"PYTHONPATH": str(installed / "src")}
    done = subprocess.run(command, cwd=top, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def committed(top: Path, changes: dict) -> Path:
    """A checkout with one commit."""
    checkout(top, changes)
    for command in (["add", "--all"], ["commit", "--quiet", "--message", "first"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *command], cwd=top, check=True)
    return top


def edit(top: Path, name: str, old: str, new: str) -> None:
    file = top / "src/apprentice" / name
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_a_stage_and_its_processes_run_the_code_beside_it_whatever_is_installed(tmp_path):
    top, cache = checkout(tmp_path / "top", {"benchmark.seeds": "200000-200001", "benchmark.max_steps": 20}), tmp_path
    stage, trace = (sys.executable, "stages/benchmark.py", "random"), top / "data/benchmark/random.parquet"

    def actions() -> set[str]:
        run(top, cache, *stage)
        return {action for episode in store.read(trace) for step in episode.steps for action in step.executed}

    assert len(actions()) > 5
    # By name, in a process of its own, and under another fingerprint: else the cache would have its episodes.
    edit(top, "players/random.py", "return ACTIONS[", 'return "sleep" or ACTIONS[')
    assert actions() == {"sleep"}


def test_a_queued_experiment_runs_its_own_code_and_not_the_workspaces(tmp_path):
    """Both ways: what is edited after it was queued shapes nothing, and what was queued does."""
    top, cache = committed(tmp_path / "top", {}), tmp_path / "cache"
    dvc = (sys.executable, "-m", "dvc")

    def steps(name: str) -> int:
        run(top, cache, *dvc, "exp", "branch", name, f"of-{name}", installed=top)
        run(top, cache, "git", "checkout", "--quiet", "--force", f"of-{name}", installed=top)
        run(top, cache, *dvc, "checkout", "--force", "data/settings", installed=top)
        return yaml.load((top / "data/settings/benchmark/rules.json").read_text())["steps"]

    run(top, cache, *dvc, "exp", "run", "--queue", "--name", "first", "settings", installed=top)
    edit(top, "params.py", '"quick": 200', '"quick": 123')
    run(top, cache, *dvc, "exp", "run", "--queue", "--name", "second", "settings", installed=top)
    edit(top, "params.py", '"quick": 123', '"quick": 77')
    run(top, cache, *dvc, "exp", "run", "--run-all", installed=top)
    assert (steps("first"), steps("second")) == (200, 123)


def test_make_says_at_once_that_there_is_no_git_checkout(tmp_path):
    for name in ("Makefile", "pyproject.toml", *(file.name for file in ROOT.glob("requirements*.lock"))):
        shutil.copy(ROOT / name, tmp_path)
    variables = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = subprocess.run(["make", "repro"], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "run git init first" in done.stderr
    assert not (tmp_path / ".venv").exists()
