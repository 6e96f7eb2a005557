"""A stage as work for another machine: what it reads and makes by dvc.yaml, its task for SkyPilot, and what is sent."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML

from apprentice import compute
from apprentice.cloud.on_machine import BASE, FOLDER
from apprentice.errors import ConfigError, WorkError
from apprentice.files import digest
from apprentice.params import HubStudent

TASK = Path("sky/task.yaml")
_MOUNTED = "/checkpoints"
"""Where a bucket is to be seen on the machine."""
_MADE_BY_REPRO = ("dvc.lock", "metrics/", "compute.yaml")
"""What may differ from the last commit: dvc repro writes it, or it changes no result."""


@dataclass(frozen=True)
class Work:
    """A stage with what it reads and what it makes."""

    stage: str
    arguments: tuple[str, ...]
    target: str
    """Its name in dvc.yaml; with the key, where there are several: benchmark_student@sft."""
    inputs: tuple[str, ...]
    """Files and folders that are brought to it: what it reads and is not in git."""
    outs: tuple[str, ...]
    name: str
    """Of its job: the stage and a digest of all that shapes the outputs."""
    base: HubStudent | None = None
    """What the machine downloads as models/base, which then is no input."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of all files and folders that it reads."""


def work(stage: str, arguments: list[str], lock: str, hub: HubStudent | None = None) -> Work:
    """What dvc.yaml says about a stage, known by its command. lock: the file with the machine's packages. hub: where
    models/base comes from, if that is to be downloaded there.

    Raises ConfigError for a stage, an input or a lock that is not there.
    """
    from dvc.dependency import ParamsDependency
    from dvc.repo import Repo

    with Repo() as repo:
        command = " ".join(["python", f"stages/{stage}.py", *arguments])
        loaded = next((known for known in repo.index.stages if getattr(known, "cmd", None) == command), None)
        if loaded is None:
            raise ConfigError(f"dvc.yaml has no stage that runs {command}")
        target = loaded.addressing
        shaping = {dep.def_path: dep.read_params() for dep in loaded.deps if isinstance(dep, ParamsDependency)}
        # Each once: the student without an adapter names models/base as its base and as its weights.
        files = list(dict.fromkeys(dep.def_path for dep in loaded.deps if not isinstance(dep, ParamsDependency)))
        outs = tuple(out.def_path for out in loaded.outs)
    if missing := [path for path in files if not Path(path).exists()]:
        raise ConfigError(f"{target} needs {', '.join(missing)}: run dvc repro {target}, which makes what is missing")
    if not Path(lock).is_file():
        raise ConfigError(f"compute.yaml: stages.{stage}.lock: there is no {lock}")
    tracked = _in_git(untracked=True)
    base = hub if BASE in files else None
    inputs = tuple(path for path in files if path not in tracked and not (base and path == BASE))
    digests = {path: digest(Path(path)) for path in (*files, lock)}
    named = {"stage": stage, "arguments": arguments, "params": shaping, "files": digests}
    shaped = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()
    name = f"apprentice-{stage}-{shaped[:10]}"
    return Work(stage, tuple(arguments), target, inputs, outs, name, base, digests)


def cluster(doing: Work, place: compute.Stage) -> str:
    """The name of its machine: the work's own, or one for all of this checkout that share a machine of this kind."""
    if place.machine is None:
        return doing.name
    kind = place.model_dump(mode="json", include={"machine", "accelerators", "cpus", "memory", "any_of", "disk_size"})
    here = json.dumps([str(Path.cwd()), kind], sort_keys=True)
    return f"apprentice-{place.machine}-{hashlib.sha256(here.encode()).hexdigest()[:10]}"


def uncommitted() -> list[str]:
    """The files of this checkout that are in no commit as they are, but for what `dvc repro` itself writes."""
    lines = _git("status", "--porcelain", "--untracked-files=all").splitlines()
    return [line[3:] for line in lines if not line[3:].startswith(_MADE_BY_REPRO)]


def task(doing: Work, place: compute.Stage, folder: str) -> dict:
    """The SkyPilot task, as its YAML. Secrets are in it by name only. folder: what to send."""
    found = YAML(typ="safe").load(TASK.read_text())
    resources = {
        "accelerators": place.accelerators,
        "cpus": place.cpus,
        "memory": place.memory,
        "disk_size": place.disk_size,
        "max_hourly_cost": place.max_hourly_usd,
        "autostop": None if place.managed else {"idle_minutes": place.autostop_minutes, "down": True},
    }
    if place.any_of:
        resources["any_of"] = [candidate.model_dump(exclude_defaults=True) for candidate in place.any_of]
    found |= {"name": doing.name, "workdir": folder}
    found["resources"] = {key: value for key, value in resources.items() if value is not None}
    found["envs"] = {"APPRENTICE_LOCK": place.lock} | {
        name: os.environ.get(name, "") if value is None else value for name, value in place.environment.items()
    }
    if place.secrets:
        found["secrets"] = dict.fromkeys(place.secrets)
    if place.checkpoints and "://" in place.checkpoints:
        found["file_mounts"] = {_MOUNTED: {"source": place.checkpoints, "mode": "MOUNT_CACHED"}}
    return found


def write_task(path: Path, folder: Path, doing: Work, place: compute.Stage) -> None:
    """Write the SkyPilot task, which sends a folder, to a file."""
    with path.open("w") as file:
        YAML().dump(task(doing, place, str(folder.absolute())), file)


def gather(folder: Path, doing: Work, place: compute.Stage, limit: dict | None, kept: Path) -> None:
    """Put all that the machine needs into an empty folder: the checkout, the inputs, and what is to be done.

    limit: what it may cost, as on_machine.Money has it; None is without an end. kept: a folder with what an earlier try
    has left, which goes along.
    """
    # What dvc repro writes may be in no commit and is needed: compute.yaml has the settings of vLLM, dvc.lock says what
    # dvc pull is to bring.
    for name in _in_git(untracked=place.dirty) | {name for name in _MADE_BY_REPRO if Path(name).is_file()}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, folder / name)
    if place.transfer == "rsync":
        for top in map(Path, doing.inputs):
            for file in [top] if top.is_file() else [file for file in top.rglob("*") if file.is_file()]:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                _link(file.resolve(), folder / file)
    own = folder / FOLDER / doing.name
    own.mkdir(parents=True)
    (own / "outcome.json").write_text("null")  # on a machine that has tried before, that of the earlier try would stay
    if kept.is_dir():
        shutil.copytree(kept, own / "kept", copy_function=_link)
    checkpoints = _MOUNTED if "://" in (place.checkpoints or "") else place.checkpoints
    told = {
        "name": doing.name,
        "stage": doing.stage,
        "target": doing.target,
        "arguments": list(doing.arguments),
        "inputs": list(doing.inputs),
        "outs": doing.outs,
        "transfer": place.transfer,
        "gpus": place.cards[1],
        "base": doing.base.model_dump() if doing.base else None,
        "digests": {path: doing.digests[path] for path in (*doing.inputs, *([BASE] if doing.base else []))},
        "checkpoints": checkpoints,
        "limit": limit,
    }
    (folder / FOLDER / "work.json").write_text(json.dumps(told))
    # With this file, SkyPilot doesn't leave out what git ignores: the inputs.
    (folder / ".skyignore").write_text("/.venv\n")


def dvc(*arguments: str) -> str:
    """What DVC's program prints. Raises WorkError with its own message if it fails."""
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise WorkError(f"dvc {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"git {arguments[0]} failed here: {done.stderr.strip()}")
    return done.stdout


def _in_git(untracked: bool) -> set[str]:
    """The files of this checkout that are in git; untracked: with those that would be."""
    others = ["--others", "--exclude-standard"] if untracked else []
    names = _git("ls-files", "-z", "--cached", *others).split("\0")
    return {name for name in names if name and Path(name).is_file()}


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # on another disk
