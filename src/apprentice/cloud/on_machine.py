"""Around a stage on the machine that SkyPilot found: its inputs, its time, and a record of what became of it.

    python -m apprentice.cloud.on_machine        in the folder that `apprentice launch` has sent

.apprentice/work.json says there what is to be done. The record, .apprentice/outcome.json, says how the stage ended and
has a digest of each output; the last line of the log repeats it, for a machine that is gone by then.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

FOLDER = Path(".apprentice")
MARK = "apprentice-outcome: "
TIME_IS_UP = 124
"""The exit code of a stage that was stopped since it would have cost too much; timeout(1) has the same."""
_GRACE = 60
"""Seconds for a stage to end by itself when its time is up."""


def main() -> int:
    work = json.loads((FOLDER / "work.json").read_text())
    remote = work["transfer"] == "remote"
    began = FOLDER / "began"
    if not began.exists():
        began.write_text(str(time.time()))
    code = _dvc("config", "--local", "core.no_scm", "true") if remote else 0
    if remote and work["inputs"] and not code:
        code = _dvc("pull", *work["inputs"])
    if not code:
        left = None if work["seconds"] is None else work["seconds"] - (time.time() - float(began.read_text()))
        code = _stage(work["stage"], work["arguments"], left)
    outcome = {"exit_code": code, "digests": {}, "stored": []}
    if code == 0:
        from apprentice.files import digest

        outcome["digests"] = {out: digest(Path(out)) for out in work["outs"]}
    if code == 0 and remote:
        outcome["exit_code"] = _dvc("commit", "--force", work["target"]) or _dvc("push", *work["outs"])
        outcome["stored"] = YAML(typ="safe").load(Path("dvc.lock").read_text())["stages"][work["target"]]["outs"]
    text = json.dumps(outcome)
    (FOLDER / "outcome.json").write_text(text)
    print(f"{MARK}{text}", flush=True)
    return outcome["exit_code"]


def _dvc(*arguments: str) -> int:
    return subprocess.call([sys.executable, "-m", "dvc", *arguments])


def _stage(stage: str, arguments: list[str], seconds: float | None) -> int:
    """Its exit code; TIME_IS_UP if it had to be stopped."""
    if seconds is not None and seconds <= 0:
        return TIME_IS_UP
    process = subprocess.Popen(
        [sys.executable, f"stages/{stage}.py", *arguments],
        env={**os.environ, "APPRENTICE_HERE": "1", "PYTHONUNBUFFERED": "1"},
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return TIME_IS_UP
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
