"""Small committed checkouts in which a stage can run."""

import shutil
import subprocess
from pathlib import Path

from apprentice.pipeline import ROOT

SETTINGS = {f"data/settings/student/{name}.json" for name in ("answers", "dtype", "held_out_play", "sft", "student")}
"""What sft depends on of the settings stage, whose one output is data/settings."""
_OTHERS = {
    f"data/settings/{name}.json"
    for name in ("benchmark/rules", "benchmark/seeds", "student/prompt", "student/sampling")
}


def checkout(top: Path) -> Path:
    """One in which sft can run, its inputs a few bytes. Returns it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in files:
        if name.startswith(("src/", "stages/", "sky/", ".dvc", ".gitignore")) or "/" not in name:
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, top / name)
    for name in ("data/sft/train.jsonl", "data/sft/val.jsonl", "models/base/config.json", *SETTINGS, *_OTHERS):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(name)
    subprocess.run(["git", "init", "--quiet"], cwd=top, check=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "--all"], cwd=top, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "--message", "test"], cwd=top, check=True)
    return top
