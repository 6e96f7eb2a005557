"""Around a stage on the machine that SkyPilot found: its GPUs, its inputs, its time, its checkpoints, its record.

    python -m apprentice.cloud.on_machine        in the folder that `apprentice launch` has sent

.apprentice/work.json says there what is to be done. .apprentice/<name>/ is the work's own: its cache; kept/, what is
kept of that for another try; the record, outcome.json, which says how the stage ended and has a digest of each output.
The last line of the log repeats the record, for a machine that is gone by then.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

from apprentice import gpus
from apprentice.cloud import kept
from apprentice.errors import WorkError
from apprentice.files import digest, remove, replacing
from apprentice.workers import in_processes

FOLDER = Path(".apprentice")
MARK = "apprentice-outcome: "
TIME_IS_UP = 124
"""The exit code of a stage that was stopped since it would have cost too much; timeout(1) has the same."""
BASE = "models/base"
_BEGAN = FOLDER / "began"
"""When sky/task.yaml began to set the machine up, in seconds of Unix time."""
_GRACE = 60
"""Seconds for a stage to end by itself when its time is up."""
_LOOK = 5
"""Seconds between two looks for a new checkpoint."""
_OFTEN, _SELDOM = 60, 300
"""Seconds after which what was spent is written, and after which the cache is packed without a new checkpoint."""


def main() -> int:
    work = json.loads((FOLDER / "work.json").read_text())
    own = FOLDER / work["name"]
    remove(own / "outcome.json")
    place = Path(work["checkpoints"]) / work["name"] if work["checkpoints"] else own
    money = Money(work["limit"], place / "spent.json")
    outcome = {"exit_code": 1, "digests": {}, "stored": [], "unfit": False, "usd": 0.0}
    try:
        next(in_processes(gpus.check, [(work["gpus"],)]))  # not in this process, which lives beside the stage
    except WorkError as error:
        print(f"this machine cannot be used: {error}", file=sys.stderr, flush=True)
        outcome["unfit"] = True
    else:
        try:
            outcome |= _work(work, own, place, money)
        except WorkError as error:
            print(error, file=sys.stderr, flush=True)
    outcome["usd"] = money.write()
    text = json.dumps(outcome)
    with replacing(own / "outcome.json") as path:
        path.write_text(text)
    print(f"{MARK}{text}", flush=True)
    return outcome["exit_code"]


class Money:
    """What this work has cost on this machine and on those before it that were taken away."""

    def __init__(self, limit: dict | None, path: Path):
        """limit: `usd` that it may cost, `hourly_usd` of the machine, and the name of the `launch`, since each has its
        own limit. None is without an end. path: where what was spent is written."""
        self._limit, self._path = limit, path
        known = json.loads(path.read_text()) if path.exists() else {}
        self._before = known.get("usd", 0.0) if limit and known.get("launch") == limit["launch"] else 0.0
        self._began = float(_BEGAN.read_text()) if _BEGAN.exists() else time.time()
        remove(_BEGAN)  # counted once

    def seconds(self) -> float | None:
        """How long the stage may go on."""
        if self._limit is None:
            return None
        return (self._limit["usd"] - self.spent()) / self._limit["hourly_usd"] * 3600

    def spent(self) -> float:
        hourly = self._limit["hourly_usd"] if self._limit else 0.0
        return self._before + (time.time() - self._began) / 3600 * hourly

    def write(self) -> float:
        """Write down what was spent, for a machine that may take this one's place. Returns it, in dollars."""
        spent = self.spent()
        if self._limit:
            with replacing(self._path) as path:
                path.write_text(json.dumps({"launch": self._limit["launch"], "usd": spent}))
        return spent


def _work(work: dict, own: Path, place: Path, money: Money) -> dict:
    """Bring the inputs, run the stage, keep what it leaves. Returns what there is to say of the outcome.

    Raises WorkError where an input is not what was sent.
    """
    remote = work["transfer"] == "remote"
    code = _dvc("config", "--local", "core.no_scm", "true") if remote else 0
    if remote and work["inputs"] and not code:
        code = _dvc("pull", *work["inputs"])
    if code:
        return {"exit_code": code}
    _complete(work)
    cache = own / "cache"
    if not cache.exists():
        kept.unpack(place / "kept", cache) or kept.unpack(own / "kept", cache)
    code = _stage(work["stage"], work["arguments"], cache, place / "kept", money)
    made = {out: digest(Path(out)) for out in work["outs"]} if code == 0 else {}
    stored = []
    if code == 0 and remote:
        code = _dvc("commit", "--force", work["target"]) or _dvc("push", *work["outs"])
        stored = YAML(typ="safe").load(Path("dvc.lock").read_text())["stages"][work["target"]]["outs"]
    if code:
        _pack(cache, place / "kept", most=1 if place == own else 2)
    if code == 0 or place != own:
        _pack(cache, own / "kept", checkpoints=False, most=1)  # episodes and replies are brought home in any case
    return {"exit_code": code, "digests": made, "stored": stored}


def _complete(work: dict) -> None:
    """See that the inputs are those that the stage is to read. Downloads the base model if it was not sent."""
    base = work["base"]
    if base and not _is(BASE, work["digests"][BASE]):
        from apprentice.student.hub import download

        remove(Path(BASE))
        download(base["model"], base["revision"], Path(BASE))
        if not _is(BASE, work["digests"][BASE]):
            raise WorkError(
                f"{BASE}, downloaded from {base['model']} at {base['revision']}, is not the one that this work began "
                "with: run dvc repro student where you launch it, or send it by download_base: false in compute.yaml"
            )
    for path in work["inputs"]:
        if not _is(path, work["digests"][path]):
            raise WorkError(
                f"{path} is not here as it was sent, or has files of an earlier try in it: apprentice launch "
                f"{work['stage']} --stop takes this machine down; then run the same command again"
            )


def _is(path: str, expected: str) -> bool:
    return Path(path).exists() and digest(Path(path)) == expected


def _dvc(*arguments: str) -> int:
    return subprocess.call([sys.executable, "-m", "dvc", *arguments])


def _stage(stage: str, arguments: list[str], cache: Path, place: Path, money: Money) -> int:
    """Its exit code; TIME_IS_UP if it had to be stopped. place: where checkpoints are kept, each when it's whole."""
    if (left := money.seconds()) is not None and left <= 0:
        return TIME_IS_UP
    cache.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, f"stages/{stage}.py", *arguments],
        env={**os.environ, "APPRENTICE_HERE": "1", "APPRENTICE_CACHE": str(cache.absolute()), "PYTHONUNBUFFERED": "1"},
    )
    packed, written, done = time.monotonic(), time.monotonic(), kept.newest(cache)
    while (code := _ended(process, _LOOK if left is None else max(0.0, min(_LOOK, left)))) is None:
        if (left := money.seconds()) is not None and left <= 0:
            process.send_signal(signal.SIGINT)
            if _ended(process, _GRACE) is None:
                process.kill()
            process.wait()
            code = TIME_IS_UP
            break
        now = time.monotonic()
        if now > written + _OFTEN:
            money.write()
            written = now
        if kept.newest(cache) - done or now > packed + _SELDOM:
            seen = kept.newest(cache)
            if _pack(cache, place):  # else the stage has removed an old checkpoint meanwhile
                packed, done = now, seen
    return code if code >= 0 else 128 - code


def _pack(cache: Path, folder: Path, **how) -> bool:
    """Whether what is to be kept could be packed."""
    try:
        kept.pack(cache, folder, **how)
    except OSError as error:
        print(f"what is in {cache} could not be kept now: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _ended(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit code of a process that ends within so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


if __name__ == "__main__":
    sys.exit(main())
