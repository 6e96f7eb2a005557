"""A stage on a machine that SkyPilot finds, as if it ran here: compute.yaml says which stages, and on what.

A job is named by all that shapes the stage's outputs, and so is its cluster, unless stages share one. While it is
there, the same work is never started again but followed. A record in the user's cache folder says what was started and
not brought home.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from ruamel.yaml import YAML

from apprentice import compute, params
from apprentice.cache import cache_folder
from apprentice.cloud import kept, machine
from apprentice.cloud.machine import ACTIVE, Sky
from apprentice.cloud.on_machine import FOLDER, MARK, TIME_IS_UP
from apprentice.cloud.work import Work, cluster, dvc, gather, task, uncommitted, work, write_task
from apprentice.errors import ConfigError, WorkError
from apprentice.files import digest, locked, remove, replacing

_ON_THE_WAY = Path(".dvc/tmp/apprentice")
"""What is sent and what has come: on the disk of the checkout, and seen by neither git nor DVC."""
_TRIES = 5
"""Times in a row that a connection may break before the follower gives up."""
_PATIENCE = 30
"""Seconds between two looks whether a shared machine is free."""
_AS_STARTED = {"managed", "transfer", "checkpoints", "machine", "teardown"}
"""What compute.yaml may say otherwise before a work that was started is home."""


def run(stage: str, arguments: list[str], place: compute.Stage, hub: params.HubStudent | None) -> int:
    """Run the stage on the machine that place describes, and bring its outputs. Returns its exit code.

    hub: where models/base comes from, if it comes from the hub. Raises ConfigError for what would not work, before
    anything is started, and WorkError.
    """
    doing = work(stage, arguments, place.lock, hub if place.download_base else None)
    sky = machine.installed()
    waiting = f"{doing.name}: waiting for another process that starts or follows it"
    with ExitStack() as held:
        held.enter_context(locked(_records() / f"{doing.name}.lock", waiting, inherited=True))
        known = _under_way(sky, doing)
        if known:  # it stays what it was started as, whatever compute.yaml says by now
            place = place.model_copy(update=known["place"])
        on = known["cluster"] if known else cluster(doing, place)
        if on != doing.name:
            waiting = f"{stage}: waiting for another stage on {on}"
            held.enter_context(locked(_records() / f"{on}.lock", waiting, inherited=True))
        if known:
            print(f"{stage}: following {doing.name}, which was started before", flush=True)
        else:
            check(sky, doing, place)
            limit = plan(sky, doing, place)
            _free(sky, doing, place, on)
            _start(sky, doing, place, on, limit)
        try:
            job = _follow(sky, doing, place, on)
            return _finish(sky, doing, place, on, job)
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


def plan(sky: Sky, doing: Work, place: compute.Stage) -> dict | None:
    """Show where it would run and for how much. Returns the limit, as on_machine.Money has it; None is without an end.

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
    if not (place.managed or place.checkpoints):
        print(
            f"{doing.stage}: what it makes is brought here when it ends. Keep this command running, or run it again "
            f"within {place.autostop_minutes} minutes (autostop_minutes) of its end: then the machine is taken down",
            flush=True,
        )
    if not place.max_total_usd or not price:
        return None
    spent = _spent(sky, doing, place)
    left = place.max_total_usd - spent
    if left <= 0:
        raise ConfigError(f"{where}.max_total_usd is ${place.max_total_usd:.2f}, and ${spent:.2f} are spent: raise it")
    print(f"{doing.stage}: at most {left / price:.1f} hours at ${price:.2f}: ${left:.2f}", flush=True)
    # A managed job's machines are not among ours: it counts on from try to try itself.
    return {"usd": left, "hourly_usd": price, "launch": "managed" if place.managed else str(time.time())}


def show(stage: str, arguments: list[str], place: compute.Stage, hub: params.HubStudent | None) -> None:
    """Print the task and the plan, and start nothing. Raises ConfigError for what would not work, and WorkError."""
    sky = machine.installed()
    doing = work(stage, arguments, place.lock, hub if place.download_base else None)
    YAML().dump(task(doing, place, "."), sys.stdout)
    check(sky, doing, place)
    plan(sky, doing, place)


def status() -> list[dict[str, str]]:
    """What was started and has not been brought home: name, stage, and the state of its job."""
    sky = machine.installed()
    found = []
    for record in sorted(_records().glob("*.json")):
        known = json.loads(record.read_text())
        job = _job(sky, known)
        if job is None and "brought" in known:
            remove(record)
            continue
        found.append({"name": known["name"], "stage": known["stage"], "job": job["status"] if job else "gone"})
    return found


def logs(stage: str) -> int:
    """Show the log of the latest work of a stage, and follow it. Returns SkyPilot's exit code.

    Raises ConfigError if nothing of the stage is under way, and WorkError if its machine is gone.
    """
    sky, known = machine.installed(), _latest(stage)
    job = _job(sky, known)
    if job is None:
        raise WorkError(f"{known['name']} is gone, and its log with it")
    return sky.follow(known["cluster"], job, known["place"]["managed"])


def stop(stage: str) -> None:
    """End the latest work of a stage, and take its machine down, if no other stage is at work there.

    What it had in its own cache is lost. Raises ConfigError if nothing of the stage is under way.
    """
    sky, known = machine.installed(), _latest(stage)
    on, managed, job = known["cluster"], known["place"]["managed"], _job(sky, known)
    if not managed and job and sky.others(on, known["name"]):
        sky.cancel(on, job)
    else:
        sky.end(on, known["name"], managed)
    remove(_record(known["name"]))


def bring(doing: Work, place: compute.Stage, on: str, outcome: dict) -> None:
    """Fetch the outputs, and put them in place when all are there and are what they were.

    on: the cluster. outcome: what on_machine.py has left. Raises WorkError for an output that is missing or broken.
    """
    _ON_THE_WAY.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_ON_THE_WAY) as name:
        folder = Path(name)
        if place.transfer == "remote":
            _pull(outcome, folder)
        else:
            machine.rsync(on, list(doing.outs), folder)
        for out in doing.outs:
            found = folder / out
            if not found.exists() or digest(found) != outcome["digests"][out]:
                raise WorkError(f"{doing.stage}: {out} came broken; run the same command again to fetch it anew")
        for out in doing.outs:
            with replacing(Path(out)) as path:
                (folder / out).rename(path)


def bring_kept(doing: Work, on: str) -> None:
    """Fetch the checkpoints, episodes and replies that a machine has kept, into the cache here and for another try."""
    own = FOLDER / doing.name
    with tempfile.TemporaryDirectory(dir=_records()) as name:
        machine.rsync(on, [f"{own}/kept"], Path(name))
        found = Path(name) / own / "kept"
        if found.is_dir() and kept.unpack(found, cache_folder()):
            with replacing(_kept(doing.name)) as path:
                found.rename(path)


def _under_way(sky: Sky, doing: Work) -> dict | None:
    """The record of this work, if its job is under way, or has ended and was not brought home."""
    record = _record(doing.name)
    if not record.exists():
        return None
    known = json.loads(record.read_text())
    job = _job(sky, known)
    if job is None or job["job_id"] == known.get("brought"):
        return None
    # A machine that went away leaves a job that failed without a record of its own.
    lost = job["status"] not in (*ACTIVE, "SUCCEEDED", "FAILED")
    return None if lost else known


def _job(sky: Sky, known: dict) -> dict | None:
    return sky.job(known["cluster"], known["name"], known["place"]["managed"])


def _spent(sky: Sky, doing: Work, place: compute.Stage) -> float:
    """Dollars that all tries at this work have cost; on a machine that is shared, what the tries themselves took."""
    return sky.spent(doing.name) if place.machine is None else _noted(doing)


def _noted(doing: Work) -> float:
    """Dollars that the record of a work has."""
    record = _record(doing.name)
    return json.loads(record.read_text())["usd"] if record.exists() else 0.0


def _free(sky: Sky, doing: Work, place: compute.Stage, on: str) -> None:
    """Wait until nobody is at work on a machine that is shared: a stage that is sent replaces the files of another."""
    said = False
    while place.machine and (others := sky.others(on, doing.name)):
        if not said:
            print(f"{doing.stage}: waiting for {', '.join(others)} on {on}", flush=True)
        said = True
        time.sleep(_PATIENCE)


def _start(sky: Sky, doing: Work, place: compute.Stage, on: str, limit: dict | None) -> None:
    """Send all that it needs, and start it. limit: as on_machine.Money has it."""
    if place.transfer == "remote" and doing.inputs:
        dvc("push", *doing.inputs)
    sent = _ON_THE_WAY / doing.name
    remove(sent)
    folder, path = sent / "folder", sent / "task.yaml"
    folder.mkdir(parents=True)
    gather(folder, doing, place, limit, _kept(doing.name))
    write_task(path, folder, doing, place)
    _keep(
        {
            "name": doing.name,
            "stage": doing.stage,
            "cluster": on,
            "place": place.model_dump(mode="json", include=_AS_STARTED),
            "started": time.time(),
            "usd": _noted(doing),
        }
    )
    if sky.launch(on, path, place.secrets, place.managed):
        raise WorkError(f"{doing.stage}: SkyPilot could not start it, see above; run the same command to try again")
    remove(sent)


def _follow(sky: Sky, doing: Work, place: compute.Stage, on: str) -> dict:
    """Show the log until the job has ended, once if it has already. Returns the job."""
    broken = 0
    while True:
        job = sky.job(on, doing.name, place.managed)
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
        sky.follow(on, job, place.managed)


def _finish(sky: Sky, doing: Work, place: compute.Stage, on: str, job: dict) -> int:
    """Bring what the stage has made or kept, and take the machine down. Returns the stage's exit code."""
    outcome = _outcome(sky, doing, place, on, job)
    if outcome and outcome["exit_code"] == 0:
        bring(doing, place, on, outcome)
    if not place.managed:
        bring_kept(doing, on)
    _leave(sky, doing, place, on, job, outcome)
    if outcome is None:
        raise WorkError(
            f"{doing.stage}: the job {job['status'].lower()} before the stage had ended, see above; run the same "
            "command again"
        )
    code, usd = outcome["exit_code"], _spent(sky, doing, place)
    print(f"{doing.stage}: {doing.name} ended with exit code {code}; about ${usd:.2f}", flush=True)
    if outcome["unfit"]:
        raise WorkError(
            f"{doing.stage}: {on} was taken down, since its GPUs cannot be used, see above. Another may be better: run "
            "the same command again. compute.yaml says how to ask for a newer driver"
        )
    if code == TIME_IS_UP:
        raise WorkError(
            f"{doing.stage}: max_total_usd is used up. Raise it in compute.yaml and run the same command: it goes on "
            f"from the last checkpoint, which is {f'in {place.checkpoints}' if place.checkpoints else 'here'}"
        )
    if code == 0:
        remove(_kept(doing.name))
    return code


def _outcome(sky: Sky, doing: Work, place: compute.Stage, on: str, job: dict) -> dict | None:
    """What on_machine.py has left; None if it came to nothing."""
    if place.managed:
        found = [line.split(MARK, 1)[1] for line in sky.logged(job) if MARK in line]
        return json.loads(found[-1]) if found else None
    left = FOLDER / doing.name / "outcome.json"
    with tempfile.TemporaryDirectory() as folder:
        machine.rsync(on, [str(left)], Path(folder))
        path = Path(folder) / left
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


def _leave(sky: Sky, doing: Work, place: compute.Stage, on: str, job: dict, outcome: dict | None) -> None:
    """Take the machine down, unless it is to stay, is shared, or is SkyPilot's own to look after."""
    unfit = outcome is not None and outcome["unfit"]
    if place.managed or (not unfit and (place.machine or not place.teardown)):
        known = json.loads(_record(doing.name).read_text())
        usd = known["usd"] + (outcome["usd"] if outcome else 0.0)
        _keep({**known, "brought": job["job_id"], "usd": usd})
        return
    sky.end(on, doing.name, False)
    remove(_record(doing.name))


def _kept(name: str) -> Path:
    """The folder with what a work's last machine has kept, to be sent along with the next."""
    return _records() / f"{name}.kept"


def _records() -> Path:
    return cache_folder() / "launch"


def _record(name: str) -> Path:
    return _records() / f"{name}.json"


def _keep(known: dict) -> None:
    """Write the record of what is under way: name, stage, cluster, place (of compute.yaml, as it was started), started
    (Unix time), usd (spent on a shared machine), brought (a job's number)."""
    with replacing(_record(known["name"])) as path:
        path.write_text(json.dumps(known))


def _latest(stage: str) -> dict:
    found = [json.loads(file.read_text()) for file in _records().glob(f"apprentice-{stage}-*.json")]
    if not found:
        raise ConfigError(f"nothing of {stage} is under way")
    return max(found, key=lambda known: known["started"])
