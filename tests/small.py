"""The whole pipeline, small: a checkout with settings that run in seconds, and stages run in it."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

from apprentice.pipeline import ROOT

yaml = YAML(typ="safe")
yaml.sort_base_mapping_type_on_output = False
SMALL = {
    "teachers.expert.seeds": "0-5",
    "teachers.expert.max_steps": 60,
    "benchmark.seeds": "200000-200003",
    "benchmark.students": {name: f"models/{name}" for name in ("base", "sft", "distill", "rl")},
    "benchmark.max_steps": 10,
    "benchmark.bootstrap_samples": 100,
    "profiles.tiny.sampling.batch_size": 2,
    "profiles.tiny.student.pretraining.seeds": "100000-100007",
    "profiles.tiny.student.pretraining.frames_per_seed": 10,
    "profiles.tiny.student.pretraining.steps": 40,
    "profiles.tiny.student.pretraining.batch_size": 8,
    "profiles.tiny.sft.epochs": 1,
    "profiles.tiny.sft.batch_size": 16,
    "profiles.tiny.sft.eval_steps": 5,
    "profiles.tiny.sft.evaluation": {"seeds": "320000-320002", "max_steps": 10},
    "profiles.tiny.distill.rounds": 2,
    "profiles.tiny.distill.worlds": 4,
    "profiles.tiny.distill.max_steps": 20,
    "profiles.tiny.distill.steps": 4,
    "profiles.tiny.distill.teacher_share": 0.5,
    "profiles.tiny.rl.evaluation": {"seeds": "310000-310002", "every": 2},
    "profiles.tiny.rl.max_invalid_rate": 1.0,
    "profiles.tiny.rl.iterations": 3,
    "profiles.tiny.rl.groups": 2,
    "profiles.tiny.rl.group_size": 3,
    "profiles.tiny.rl.max_steps": 25,
    "profiles.tiny.rl.decisions": 32,
    "profiles.tiny.rl.batch_size": 16,
    "profiles.tiny.rl.reward": {"invalid": -1.0},  # so that even this student has something to learn
}


def checkout(top: Path, changes: dict) -> Path:
    """A copy of this checkout with other parameters."""
    top.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file() and not name.startswith(("metrics/", "dvc.lock")):
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, top / name)
    for compiled in (ROOT / "src").rglob("*.nb[ci]"):  # by numba, which takes them for files as old; it took 15 seconds
        (top / compiled.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy2(compiled, top / compiled.relative_to(ROOT))
    tree = yaml.load((top / "params.yaml").read_text())
    for path, value in changes.items():
        *parents, key = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[key] = value
    with (top / "params.yaml").open("w") as file:
        yaml.dump(tree, file)
    subprocess.run(["git", "init", "--quiet", top], check=True)
    return top


def environment(cache: Path) -> dict[str, str]:
    folder = str(Path(sys.executable).parent)
    return {**os.environ, "APPRENTICE_CACHE": str(cache), "PATH": folder + os.pathsep + os.environ["PATH"]}


def stage(top: Path, cache: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=top, env=environment(cache), capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def on_cores(top: Path, cores: int, *command: str) -> subprocess.CompletedProcess:
    """Run a stage with so many of this machine's cores, and the checkout's own cache."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    return subprocess.run(
        [sys.executable, *command],
        cwd=top,
        env=environment(top / "cache"),
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        capture_output=True,
        text=True,
        timeout=900,
    )


def started(top: Path, cache: Path, *command: str) -> subprocess.Popen:
    """What it prints goes to a file, since a pipe that nobody reads fills up; `process.stdout` reads it."""
    with tempfile.NamedTemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=top,
            env=environment(cache),
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        process.stdout = open(printed.name, "rb")  # noqa: SIM115  for whoever has the process
    return process


def wait_for(condition, process: subprocess.Popen, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()[-3000:]
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
