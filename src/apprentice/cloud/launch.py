"""A stage on a machine that SkyPilot finds, as if it ran here: compute.yaml says which stages, and on what.

SkyPilot is called as a program from its own environment (`make sky`). A cluster, or a managed job, is named by all that
shapes the stage's outputs: while it is there, the same work is never started again but followed.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from apprentice import compute
from apprentice.cache import cache_folder
from apprentice.cloud.on_machine import FOLDER, MARK, TIME_IS_UP
from apprentice.errors import ConfigError, WorkError
from apprentice.files import digest

PROGRAM = Path(".venv-sky/bin/sky")
TASK = Path("sky/task.yaml")
ACTIVE = (
    "INIT",
    "PENDING",
    "SETTING_UP",
    "RUNNING",
    "SUBMITTED",
    "STARTING",
    "RECOVERING",
    "WINDING_DOWN",
    "CANCELLING",
)
"""States of a job that has not ended; SkyPilot's names, of clusters' jobs and of managed ones."""
_MADE_BY_REPRO = ("dvc.lock", "metrics/", "compute.yaml")
"""What may differ from the last commit: dvc repro writes it, or it changes no result."""
_TRIES = 5
"""Times in a row that a connection may break before the follower gives up."""


@dataclass(frozen=True)
class Work:
    """A stage with what it reads and what it makes."""

    stage: str
    arguments: tuple[str, ...]
    target: str
    """Its name in dvc.yaml; with the key, where there are several: benchmark_student@sft."""
    inputs: tuple[str, ...]
    """Files and folders that it needs and that are not in git."""
    outs: tuple[str, ...]
    name: str
    """Of its cluster: the stage and a digest of all that shapes the outputs."""


def work(stage: str, arguments: list[str], lock: str) -> Work:
    """What dvc.yaml says about a stage, known by its command. Raises ConfigError for an input that is not there."""
    from dvc.dependency import ParamsDependency
    from dvc.repo import Repo

    with Repo() as repo:
        command = " ".join(["python", f"stages/{stage}.py", *arguments])
        loaded = next((known for known in repo.index.stages if getattr(known, "cmd", None) == command), None)
        if loaded is None:
            raise ConfigError(f"dvc.yaml has no stage that runs {command}")
        target = loaded.addressing
        shaping = {dep.def_path: dep.read_params() for dep in loaded.deps if isinstance(dep, ParamsDependency)}
        files = [dep.def_path for dep in loaded.deps if not isinstance(dep, ParamsDependency)]
        outs = tuple(out.def_path for out in loaded.outs)
    if missing := [path for path in files if not Path(path).exists()]:
        raise ConfigError(f"{target} needs {', '.join(missing)}: run dvc repro {target}, which makes what is missing")
    if not Path(lock).is_file():
        raise ConfigError(f"compute.yaml: stages.{stage}.lock: there is no {lock}")
    tracked = _sent(True)
    inputs = tuple(path for path in files if path not in tracked)
    named = {"stage": stage, "arguments": arguments, "params": shaping}
    named["files"] = {path: digest(Path(path)) for path in (*files, lock)}
    shaped = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()
    return Work(stage, tuple(arguments), target, inputs, outs, f"apprentice-{stage}-{shaped[:10]}")


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
    if place.checkpoints:
        found["envs"]["APPRENTICE_CACHE"] = place.checkpoints
        if "://" in place.checkpoints:
            found["envs"]["APPRENTICE_CACHE"] = "/checkpoints"
            found["file_mounts"] = {"/checkpoints": {"source": place.checkpoints, "mode": "MOUNT"}}
    return found


def run(stage: str, arguments: list[str], place: compute.Stage) -> int:
    """Run the stage on the machine that place describes, and bring its outputs. Returns its exit code.

    Raises ConfigError for what would not work, before anything is started, and WorkError.
    """
    doing = work(stage, arguments, place.lock)
    sky = _program()
    with _alone(doing.name):
        job = _find(sky, doing, place)
        if job is None:
            check(sky, doing, place)
            seconds = plan(sky, doing, place)
            _start(sky, doing, place, seconds)
        else:
            print(f"{stage}: following {doing.name}, which was started before", flush=True)
        try:
            job = _follow(sky, doing, place)
            return _finish(sky, doing, place, job)
        except KeyboardInterrupt:
            print(
                f"\n{stage}: {doing.name} goes on; run the same command again to follow it, or end it by "
                f"apprentice launch {stage} --stop",
                file=sys.stderr,
                flush=True,
            )
            return 130


def check(sky: "Sky", doing: Work, place: compute.Stage) -> None:
    """Raise ConfigError for what is missing on this side, or where no machine could be had."""
    where = f"compute.yaml: stages.{doing.stage}"
    for name in (*place.secrets, *(name for name, value in place.environment.items() if value is None)):
        if not os.environ.get(name):
            raise ConfigError(f"{where} names {name}, which is not set here: export {name}=…")
    changed = [
        line[3:]
        for line in _git("status", "--porcelain", "--untracked-files=all").splitlines()
        if not line[3:].startswith(_MADE_BY_REPRO)
    ]
    if changed and not place.dirty:
        raise ConfigError(
            f"{doing.stage} would run files that are in no commit ({', '.join(changed[:5])}): commit them, or say so "
            f"by {where.removeprefix('compute.yaml: ')}.dirty: true in compute.yaml"
        )
    if place.transfer == "remote" and "core.remote" not in _dvc("config", "--list"):
        raise ConfigError(f"{where}.transfer is remote, and DVC has no default remote: dvc remote add --default …")
    wanted = sorted({candidate.infra.split("/")[0] for candidate in place.any_of or ()})
    enabled = {name.lower() for names in sky.json("check", *wanted).values() for name in names}
    if not enabled:
        raise ConfigError(
            f"SkyPilot has no credentials for {', '.join(wanted) or 'any cloud'}: {PROGRAM} check says what is missing"
        )


def plan(sky: "Sky", doing: Work, place: compute.Stage) -> float | None:
    """Show where it would run and for how much. Returns for how many seconds; None is without an end.

    Raises ConfigError if that is more than compute.yaml allows.
    """
    where = f"compute.yaml: stages.{doing.stage}"
    with tempfile.TemporaryDirectory() as folder:
        path = _written(Path(folder), Path(folder), doing, place)
        said = sky.text("launch", "--dryrun", "--yes", "--cluster", doing.name, *_secrets(place), path)
    print(said.strip(), flush=True)
    price = price_of(said)
    if price is None and (place.max_hourly_usd or place.max_total_usd):
        raise ConfigError(f"{where} has a limit in dollars, and SkyPilot names no price for what it would take")
    if place.max_hourly_usd and price > place.max_hourly_usd:
        raise ConfigError(
            f"{where}.max_hourly_usd is ${place.max_hourly_usd:.2f}, and the cheapest machine is ${price:.2f} an hour"
        )
    if not place.max_total_usd or not price:
        return None
    spent = sum(record["total_cost"] for record in sky.costs() if record["name"] == doing.name)
    left = place.max_total_usd - spent
    if left <= 0:
        raise ConfigError(f"{where}.max_total_usd is ${place.max_total_usd:.2f}, and ${spent:.2f} are spent: raise it")
    print(f"{doing.stage}: at most {left / price:.1f} hours at ${price:.2f}: ${left:.2f}", flush=True)
    return left / price * 3600


def show(stage: str, arguments: list[str], place: compute.Stage) -> None:
    """Print the task and the plan, and start nothing."""
    sky = _program()
    doing = work(stage, arguments, place.lock)
    YAML().dump(task(doing, place, "."), sys.stdout)
    check(sky, doing, place)
    plan(sky, doing, place)


def price_of(dryrun: str) -> float | None:
    """Dollars an hour of the chosen machine in what `sky launch --dryrun` prints; None if it names none."""
    found = re.search(r"(\d+\.\d+)\s+✔", plain(dryrun))
    return float(found[1]) if found else None


def plain(text: str) -> str:
    """Without a terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def status() -> list[dict[str, str]]:
    """What was started and has not been brought home: name, stage, and the state of its job."""
    sky = _program()
    found = []
    for record in sorted(_records().glob("*.json")):
        known = json.loads(record.read_text())
        job = _jobs(sky, known["name"], known["managed"])
        found.append({"name": known["name"], "stage": known["stage"], "job": job["status"] if job else "gone"})
    return found


def logs(stage: str) -> int:
    """Show the log of the latest work of a stage, and follow it. Returns SkyPilot's exit code."""
    sky, known = _program(), _latest(stage)
    job = _jobs(sky, known["name"], known["managed"])
    if job is None:
        raise WorkError(f"{known['name']} is gone, and its log with it")
    return subprocess.call(sky.logs(known["name"], job, known["managed"]), env=sky.environment)


def stop(stage: str) -> None:
    """End the latest work of a stage, and take its machine down; what it had in its own cache is lost."""
    sky, known = _program(), _latest(stage)
    _end(sky, known["name"], known["managed"])
    _record(known["name"]).unlink(missing_ok=True)


class Sky:
    """SkyPilot's program."""

    def __init__(self, program: Path):
        self.program = str(program.absolute())
        # Nothing of this environment may reach its Python.
        hidden = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment |= {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PYTHONUNBUFFERED": "1"}

    def call(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.program, *arguments], capture_output=True, text=True, env=self.environment, stdin=subprocess.DEVNULL
        )

    def text(self, *arguments: str) -> str:
        """What it prints. Raises WorkError with that if it fails."""
        done = self.call(*arguments)
        if done.returncode:
            raise WorkError(f"sky {arguments[0]} failed:\n{done.stdout}{done.stderr}".strip())
        return done.stdout

    def json(self, *arguments: str):
        """What it prints with --output json."""
        said = plain(self.text(*arguments, "--output", "json"))
        # It may say before that it starts its server.
        begins = re.search(r"^[\[{]", said, re.MULTILINE)
        if begins is None:
            raise WorkError(f"sky {arguments[0]} gave no JSON:\n{said}")
        return json.JSONDecoder().raw_decode(said, begins.start())[0]

    def costs(self) -> list[dict]:
        """Every cluster there was, with `name` and `total_cost` in dollars."""
        return self.json("cost-report", "--all", "--days", "0")

    def logs(self, name: str, job: dict, managed: bool) -> list[str]:
        """The command that follows a job."""
        if managed:
            return [self.program, "jobs", "logs", str(job["job_id"])]
        return [self.program, "logs", name, str(job["job_id"])]


def _program() -> Sky:
    if not PROGRAM.exists():
        raise ConfigError("SkyPilot is not there: run make sky, which gives it an environment of its own")
    return Sky(PROGRAM)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"git {arguments[0]} failed here: {done.stderr.strip()}")
    return done.stdout


def _dvc(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise WorkError(f"dvc {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _sent(untracked: bool) -> set[str]:
    """The files of this checkout that are in git, or would be."""
    others = ["--others", "--exclude-standard"] if untracked else []
    names = _git("ls-files", "-z", "--cached", *others).split("\0")
    return {name for name in names if name and Path(name).is_file()}


def _records() -> Path:
    return cache_folder() / "launch"


def _record(name: str) -> Path:
    return _records() / f"{name}.json"


def _latest(stage: str) -> dict:
    found = [json.loads(file.read_text()) for file in _records().glob(f"apprentice-{stage}-*.json")]
    if not found:
        raise ConfigError(f"nothing of {stage} is under way")
    return max(found, key=lambda known: known["started"])


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Wait until no other process starts or follows this work."""
    _records().mkdir(parents=True, exist_ok=True)
    with (_records() / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: waiting for another process that starts or follows it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        os.set_inheritable(file.fileno(), True)
        yield


def _jobs(sky: Sky, name: str, managed: bool) -> dict | None:
    """The last job of this name, with `job_id` and `status`; None if there is none."""
    if managed:
        found = [job for job in sky.json("jobs", "queue") if job["job_name"] == name]
    else:
        clusters = {known["name"]: known for known in sky.json("status", "--refresh", name)}
        if name not in clusters:
            return None
        found = sky.json("queue", name).get(name, [])
    return max(found, key=lambda job: job["job_id"], default=None)


def _find(sky: Sky, doing: Work, place: compute.Stage) -> dict | None:
    """The job that does this work or has done it, and was not brought home."""
    record = _record(doing.name)
    if not record.exists():
        return None
    known = json.loads(record.read_text())
    job = _jobs(sky, doing.name, place.managed)
    if job is None or job["job_id"] == known.get("brought"):
        return None
    # A machine that went away leaves a job that failed without a record of its own.
    lost = job["status"] not in (*ACTIVE, "SUCCEEDED", "FAILED")
    return None if lost else job


def _written(place_of_task: Path, folder: Path, doing: Work, place: compute.Stage) -> str:
    """Write the task, which sends a folder. Returns its path."""
    path = place_of_task / "task.yaml"
    with path.open("w") as file:
        YAML().dump(task(doing, place, str(folder.absolute())), file)
    return str(path)


def gather(folder: Path, doing: Work, place: compute.Stage, seconds: float | None) -> None:
    """Put all that the machine needs into an empty folder: the checkout, the inputs, and what is to be done."""
    for name in _sent(place.dirty):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, folder / name)
    if place.transfer == "rsync":
        for top in map(Path, doing.inputs):
            for file in [top] if top.is_file() else [file for file in top.rglob("*") if file.is_file()]:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                _link(file.resolve(), folder / file)
    (folder / FOLDER).mkdir()
    told = {
        "stage": doing.stage,
        "target": doing.target,
        "arguments": list(doing.arguments),
        "inputs": list(doing.inputs),
        "outs": doing.outs,
        "transfer": place.transfer,
        "seconds": seconds,
    }
    (folder / FOLDER / "work.json").write_text(json.dumps(told))
    # With this file, SkyPilot doesn't leave out what git ignores: the inputs.
    (folder / ".skyignore").write_text("/.venv\n")


def _secrets(place: compute.Stage) -> list[str]:
    """Their names for SkyPilot's command line, which takes the values from the environment."""
    return [part for name in place.secrets for part in ("--secret", name)]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # on another disk


def _start(sky: Sky, doing: Work, place: compute.Stage, seconds: float | None) -> None:
    if place.transfer == "remote" and doing.inputs:
        _dvc("push", *doing.inputs)
    sent = Path(".dvc/tmp/apprentice") / doing.name
    shutil.rmtree(sent, ignore_errors=True)
    folder = sent / "folder"
    folder.mkdir(parents=True)
    gather(folder, doing, place, seconds)
    path = _written(sent, folder, doing, place)
    known = {"name": doing.name, "stage": doing.stage, "managed": place.managed, "started": time.time()}
    _record(doing.name).write_text(json.dumps(known))
    command = ["jobs", "launch", "--name"] if place.managed else ["launch", "--cluster"]
    # In a session of its own, so that Ctrl-C doesn't cut it off half-way; it keeps the lock until it's done.
    process = subprocess.Popen(
        [sky.program, *command, doing.name, "--detach-run", "--yes", *_secrets(place), path],
        env=sky.environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        close_fds=False,
    )
    if process.wait():
        raise WorkError(f"{doing.stage}: SkyPilot could not start it, see above; run the same command to try again")
    shutil.rmtree(sent, ignore_errors=True)


def _follow(sky: Sky, doing: Work, place: compute.Stage) -> dict:
    """Show the log until the job has ended, once if it has already. Returns the job."""
    broken = 0
    while True:
        job = _jobs(sky, doing.name, place.managed)
        if job is None:
            raise WorkError(
                f"{doing.stage}: {doing.name} is gone, taken away or down; run the same command again: it goes on from "
                "the last checkpoint, if compute.yaml names a place for them"
            )
        if job["status"] not in ACTIVE and broken:
            return job
        if broken > _TRIES:
            raise WorkError(f"{doing.stage}: the connection breaks; {doing.name} goes on: run the same command again")
        if broken > 1:
            time.sleep(min(60, 2**broken))
        broken += 1
        process = subprocess.Popen(
            sky.logs(doing.name, job, place.managed), env=sky.environment, start_new_session=True
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _finish(sky: Sky, doing: Work, place: compute.Stage, job: dict) -> int:
    """Bring the outputs and take the machine down. Returns the stage's exit code."""
    outcome = _outcome(sky, doing, place, job)
    if outcome is None:
        _down(sky, doing, place, job)
        raise WorkError(
            f"{doing.stage}: the job {job['status'].lower()} before the stage had ended, see above; run the same "
            "command again"
        )
    code = outcome["exit_code"]
    if code == 0:
        _bring(sky, doing, place, outcome)
    _down(sky, doing, place, job)
    cost = sum(record["total_cost"] for record in sky.costs() if record["name"] == doing.name)
    print(f"{doing.stage}: {doing.name} ended with exit code {code}; about ${cost:.2f}", flush=True)
    if code == TIME_IS_UP:
        raise WorkError(f"{doing.stage}: max_total_usd is used up: raise it in compute.yaml, and run the same command")
    return code


def _outcome(sky: Sky, doing: Work, place: compute.Stage, job: dict) -> dict | None:
    """What on_machine.py has left; None if it came to nothing."""
    if place.managed:
        done = subprocess.run(
            [*sky.logs(doing.name, job, True), "--no-follow"], capture_output=True, env=sky.environment
        )
        found = [line.split(MARK, 1)[1] for line in done.stdout.decode(errors="replace").splitlines() if MARK in line]
        return json.loads(found[-1]) if found else None
    with tempfile.TemporaryDirectory() as folder:
        _rsync(doing.name, [f"{FOLDER}/outcome.json"], Path(folder))
        path = Path(folder) / FOLDER / "outcome.json"
        return json.loads(path.read_text()) if path.is_file() else None


def _rsync(name: str, paths: list[str], folder: Path) -> None:
    """Copy files and folders of the cluster's checkout into a folder; what isn't there is left out."""
    home = Path.home()
    key = home / ".sky/generated/ssh-keys" / f"{name}.key"
    shell = f"ssh -q -F {home / '.ssh/config'}" + (f" -i {key}" if key.exists() else "")
    sources = [f"{name}:sky_workdir/./{path}" for path in paths]
    done = subprocess.run(
        ["rsync", "--archive", "--relative", "--ignore-missing-args", "--rsh", shell, *sources, str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise WorkError(f"nothing could be fetched from {name}: {done.stderr.strip()}; run the same command again")


def _bring(sky: Sky, doing: Work, place: compute.Stage, outcome: dict) -> None:
    """Fetch the outputs, and put them in place when all are there and are what they were."""
    top = Path(".dvc/tmp/apprentice")
    top.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=top) as name:
        folder = Path(name)
        if place.transfer == "remote":
            _pull(outcome, folder)
        else:
            _rsync(doing.name, list(doing.outs), folder)
        for out in doing.outs:
            found = folder / out
            if not found.exists() or digest(found) != outcome["digests"][out]:
                raise WorkError(f"{doing.stage}: {out} came broken; run the same command again to fetch it anew")
        for out in doing.outs:
            target = Path(out)
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / out).rename(target)


def _pull(outcome: dict, folder: Path) -> None:
    """The outputs from DVC's remote, by way of its cache here."""
    (folder / ".dvc").mkdir()
    for name in ("config", "config.local"):
        if Path(".dvc", name).exists():
            shutil.copy(Path(".dvc", name), folder / ".dvc" / name)
    here = [sys.executable, "-m", "dvc"]
    store = _dvc("cache", "dir").strip()
    for arguments in (["config", "--local", "core.no_scm", "true"], ["cache", "dir", "--local", store]):
        subprocess.run([*here, *arguments], cwd=folder, check=True, capture_output=True)
    for out in outcome["stored"]:
        target = folder / out["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        out = {**out, "path": target.name}
        with (target.parent / f"{target.name}.dvc").open("w") as file:
            YAML().dump({"outs": [out]}, file)
    done = subprocess.run([*here, "pull"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise WorkError(f"dvc pull failed: {done.stderr.strip()}; run the same command again")


def _down(sky: Sky, doing: Work, place: compute.Stage, job: dict) -> None:
    record = _record(doing.name)
    if place.managed or not place.teardown:
        record.write_text(json.dumps({**json.loads(record.read_text()), "brought": job["job_id"]}))
        return
    _end(sky, doing.name, False)
    record.unlink(missing_ok=True)


def _end(sky: Sky, name: str, managed: bool) -> None:
    sky.text("jobs", "cancel", "--yes", "--name", name) if managed else sky.text("down", "--yes", name)
