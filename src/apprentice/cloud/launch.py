"""A stage on a machine that SkyPilot finds, as if it ran here: compute.yaml says which stages, and on what.

A cluster, or a managed job, is named by all that shapes the stage's outputs: while it is there, the same work is never
started again but followed. A record in the user's cache folder says what was started and not brought home.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

from apprentice import compute
from apprentice.cache import cache_folder
from apprentice.cloud import machine
from apprentice.cloud.machine import ACTIVE, Sky
from apprentice.cloud.on_machine import FOLDER, MARK, TIME_IS_UP
from apprentice.cloud.work import Work, dvc, gather, task, uncommitted, work, write_task
from apprentice.errors import ConfigError, WorkError
from apprentice.files import digest, locked, remove, replacing

_ON_THE_WAY = Path(".dvc/tmp/apprentice")
"""What is sent and what has come: on the disk of the checkout, and seen by neither git nor DVC."""
_TRIES = 5
"""Times in a row that a connection may break before the follower gives up."""


def run(stage: str, arguments: list[str], place: compute.Stage) -> int:
    """Run the stage on the machine that place describes, and bring its outputs. Returns its exit code.

    Raises ConfigError for what would not work, before anything is started, and WorkError.
    """
    doing = work(stage, arguments, place.lock)
    sky = machine.installed()
    waiting = f"{doing.name}: waiting for another process that starts or follows it"
    with locked(_records() / f"{doing.name}.lock", waiting, inherited=True):
        if _find(sky, doing, place) is None:
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


def check(sky: Sky, doing: Work, place: compute.Stage) -> None:
    """Raise ConfigError for what is missing on this side, or where no machine could be had."""
    where = f"compute.yaml: stages.{doing.stage}"
    for name in (*place.secrets, *(name for name, value in place.environment.items() if value is None)):
        if not os.environ.get(name):
            raise ConfigError(f"{where} names {name}, which is not set here: export {name}=…")
    changed = uncommitted()
    if changed and not place.dirty:
        raise ConfigError(
            f"{doing.stage} would run files that are in no commit ({', '.join(changed[:5])}): commit them, or say so "
            f"by {where.removeprefix('compute.yaml: ')}.dirty: true in compute.yaml"
        )
    if place.transfer == "remote" and "core.remote" not in dvc("config", "--list"):
        raise ConfigError(f"{where}.transfer is remote, and DVC has no default remote: dvc remote add --default …")
    wanted = sorted({candidate.infra.split("/")[0] for candidate in place.any_of or ()})
    enabled = {name.lower() for names in sky.json("check", *wanted).values() for name in names}
    if not enabled:
        raise ConfigError(
            f"SkyPilot has no credentials for {', '.join(wanted) or 'any cloud'}: {machine.PROGRAM} check says what is "
            "missing"
        )


def plan(sky: Sky, doing: Work, place: compute.Stage) -> float | None:
    """Show where it would run and for how much. Returns for how many seconds; None is without an end.

    Raises ConfigError if that is more than compute.yaml allows.
    """
    where = f"compute.yaml: stages.{doing.stage}"
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "task.yaml"
        write_task(path, Path(name), doing, place)
        said = sky.dryrun(doing.name, path, place.secrets)
    print(said.strip(), flush=True)
    price = machine.price_of(said)
    if price is None and (place.max_hourly_usd or place.max_total_usd):
        raise ConfigError(f"{where} has a limit in dollars, and SkyPilot names no price for what it would take")
    if place.max_hourly_usd and price > place.max_hourly_usd:
        raise ConfigError(
            f"{where}.max_hourly_usd is ${place.max_hourly_usd:.2f}, and the cheapest machine is ${price:.2f} an hour"
        )
    if not place.max_total_usd or not price:
        return None
    spent = sky.spent(doing.name)
    left = place.max_total_usd - spent
    if left <= 0:
        raise ConfigError(f"{where}.max_total_usd is ${place.max_total_usd:.2f}, and ${spent:.2f} are spent: raise it")
    print(f"{doing.stage}: at most {left / price:.1f} hours at ${price:.2f}: ${left:.2f}", flush=True)
    return left / price * 3600


def show(stage: str, arguments: list[str], place: compute.Stage) -> None:
    """Print the task and the plan, and start nothing. Raises ConfigError for what would not work, and WorkError."""
    sky = machine.installed()
    doing = work(stage, arguments, place.lock)
    YAML().dump(task(doing, place, "."), sys.stdout)
    check(sky, doing, place)
    plan(sky, doing, place)


def status() -> list[dict[str, str]]:
    """What was started and has not been brought home: name, stage, and the state of its job."""
    sky = machine.installed()
    found = []
    for record in sorted(_records().glob("*.json")):
        known = json.loads(record.read_text())
        job = sky.job(known["name"], known["managed"])
        found.append({"name": known["name"], "stage": known["stage"], "job": job["status"] if job else "gone"})
    return found


def logs(stage: str) -> int:
    """Show the log of the latest work of a stage, and follow it. Returns SkyPilot's exit code.

    Raises ConfigError if nothing of the stage is under way, and WorkError if its machine is gone.
    """
    sky, known = machine.installed(), _latest(stage)
    job = sky.job(known["name"], known["managed"])
    if job is None:
        raise WorkError(f"{known['name']} is gone, and its log with it")
    return sky.follow(known["name"], job, known["managed"])


def stop(stage: str) -> None:
    """End the latest work of a stage, and take its machine down; what it had in its own cache is lost.

    Raises ConfigError if nothing of the stage is under way.
    """
    sky, known = machine.installed(), _latest(stage)
    sky.end(known["name"], known["managed"])
    remove(_record(known["name"]))


def bring(doing: Work, place: compute.Stage, outcome: dict) -> None:
    """Fetch the outputs, and put them in place when all are there and are what they were.

    outcome: what on_machine.py has left. Raises WorkError for an output that is missing or broken.
    """
    _ON_THE_WAY.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_ON_THE_WAY) as name:
        folder = Path(name)
        if place.transfer == "remote":
            _pull(outcome, folder)
        else:
            machine.rsync(doing.name, list(doing.outs), folder)
        for out in doing.outs:
            found = folder / out
            if not found.exists() or digest(found) != outcome["digests"][out]:
                raise WorkError(f"{doing.stage}: {out} came broken; run the same command again to fetch it anew")
        for out in doing.outs:
            with replacing(Path(out)) as path:
                (folder / out).rename(path)


def _find(sky: Sky, doing: Work, place: compute.Stage) -> dict | None:
    """The job that does this work or has done it, and was not brought home."""
    record = _record(doing.name)
    if not record.exists():
        return None
    known = json.loads(record.read_text())
    job = sky.job(doing.name, place.managed)
    if job is None or job["job_id"] == known.get("brought"):
        return None
    # A machine that went away leaves a job that failed without a record of its own.
    lost = job["status"] not in (*ACTIVE, "SUCCEEDED", "FAILED")
    return None if lost else job


def _start(sky: Sky, doing: Work, place: compute.Stage, seconds: float | None) -> None:
    """Send all that it needs, and start it. seconds: how long it may take there; None is without an end."""
    if place.transfer == "remote" and doing.inputs:
        dvc("push", *doing.inputs)
    sent = _ON_THE_WAY / doing.name
    remove(sent)
    folder, path = sent / "folder", sent / "task.yaml"
    folder.mkdir(parents=True)
    gather(folder, doing, place, seconds)
    write_task(path, folder, doing, place)
    _keep({"name": doing.name, "stage": doing.stage, "managed": place.managed, "started": time.time()})
    if sky.launch(doing.name, path, place.secrets, place.managed):
        raise WorkError(f"{doing.stage}: SkyPilot could not start it, see above; run the same command to try again")
    remove(sent)


def _follow(sky: Sky, doing: Work, place: compute.Stage) -> dict:
    """Show the log until the job has ended, once if it has already. Returns the job."""
    broken = 0
    while True:
        job = sky.job(doing.name, place.managed)
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
        sky.follow(doing.name, job, place.managed)


def _finish(sky: Sky, doing: Work, place: compute.Stage, job: dict) -> int:
    """Bring the outputs and take the machine down. Returns the stage's exit code."""
    outcome = _outcome(sky, doing, place, job)
    if outcome is None:
        _leave(sky, doing, place, job)
        raise WorkError(
            f"{doing.stage}: the job {job['status'].lower()} before the stage had ended, see above; run the same "
            "command again"
        )
    code = outcome["exit_code"]
    if code == 0:
        bring(doing, place, outcome)
    _leave(sky, doing, place, job)
    print(f"{doing.stage}: {doing.name} ended with exit code {code}; about ${sky.spent(doing.name):.2f}", flush=True)
    if code == TIME_IS_UP:
        raise WorkError(f"{doing.stage}: max_total_usd is used up: raise it in compute.yaml, and run the same command")
    return code


def _outcome(sky: Sky, doing: Work, place: compute.Stage, job: dict) -> dict | None:
    """What on_machine.py has left; None if it came to nothing."""
    if place.managed:
        found = [line.split(MARK, 1)[1] for line in sky.logged(doing.name, job, True) if MARK in line]
        return json.loads(found[-1]) if found else None
    with tempfile.TemporaryDirectory() as folder:
        machine.rsync(doing.name, [f"{FOLDER}/outcome.json"], Path(folder))
        path = Path(folder) / FOLDER / "outcome.json"
        return json.loads(path.read_text()) if path.is_file() else None


def _pull(outcome: dict, folder: Path) -> None:
    """The outputs from DVC's remote, by way of its cache here."""
    (folder / ".dvc").mkdir()
    for name in ("config", "config.local"):
        if Path(".dvc", name).exists():
            shutil.copy(Path(".dvc", name), folder / ".dvc" / name)
    here = [sys.executable, "-m", "dvc"]
    store = dvc("cache", "dir").strip()
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


def _leave(sky: Sky, doing: Work, place: compute.Stage, job: dict) -> None:
    """Take the machine down, unless it is to stay or is SkyPilot's own to look after."""
    if place.managed or not place.teardown:
        _keep({**json.loads(_record(doing.name).read_text()), "brought": job["job_id"]})
        return
    sky.end(doing.name, False)
    remove(_record(doing.name))


def _records() -> Path:
    return cache_folder() / "launch"


def _record(name: str) -> Path:
    return _records() / f"{name}.json"


def _keep(known: dict) -> None:
    """Write the record of what is under way: name, stage, managed, started (Unix time), brought (a job's number)."""
    with replacing(_record(known["name"])) as path:
        path.write_text(json.dumps(known))


def _latest(stage: str) -> dict:
    found = [json.loads(file.read_text()) for file in _records().glob(f"apprentice-{stage}-*.json")]
    if not found:
        raise ConfigError(f"nothing of {stage} is under way")
    return max(found, key=lambda known: known["started"])
