"""SkyPilot, a program in an environment of its own (`make sky`): its jobs and machines, and what they cost."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

from apprentice.errors import ConfigError, WorkError

PROGRAM = Path(".venv-sky/bin/sky")
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


class Sky:
    """SkyPilot's program. A job is on a cluster, or managed: then SkyPilot looks after its machine."""

    def __init__(self, program: Path = PROGRAM):
        self._program = str(program.absolute())
        # Nothing of this environment may reach its Python.
        hidden = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
        self._environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self._environment |= {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PYTHONUNBUFFERED": "1"}

    def text(self, *arguments: str) -> str:
        """What it prints. Raises WorkError with that if it fails."""
        done = self._call(*arguments)
        if done.returncode:
            raise WorkError(f"sky {arguments[0]} failed:\n{done.stdout}{done.stderr}".strip())
        return done.stdout

    def json(self, *arguments: str):
        """What it prints with --output json. Raises WorkError if it fails, or prints something else."""
        said = plain(self.text(*arguments, "--output", "json"))
        # It may say before that it starts its server.
        begins = re.search(r"^[\[{]", said, re.MULTILINE)
        if begins is None:
            raise WorkError(f"sky {arguments[0]} gave no JSON:\n{said}")
        return json.JSONDecoder().raw_decode(said, begins.start())[0]

    def jobs(self, cluster: str) -> list[dict]:
        """A cluster's jobs, each with `job_name`, `job_id` and `status`; none if there's no such cluster.

        SkyPilot asks the cloud first whether a machine with autostop is still there: all of ours have it.
        """
        return self.json("queue", cluster).get(cluster, [])

    def job(self, cluster: str, name: str, managed: bool) -> dict | None:
        """The last job of this name, with `job_id` and `status`; None if there is none."""
        every = self.json("jobs", "queue") if managed else self.jobs(cluster)
        found = [job for job in every if job["job_name"] == name]
        return max(found, key=lambda job: job["job_id"], default=None)

    def others(self, cluster: str, name: str) -> list[str]:
        """The names of other jobs at work on a cluster."""
        every = self.jobs(cluster)
        return [job["job_name"] for job in every if job["job_name"] != name and job["status"] in ACTIVE]

    def spent(self, name: str) -> float:
        """Dollars that all clusters of this name have cost."""
        every = self.json("cost-report", "--all", "--days", "0")
        return sum(record["total_cost"] for record in every if record["name"] == name)

    def dryrun(self, name: str, task: Path, secrets: tuple[str, ...]) -> str:
        """Where a task would run and for how much, as SkyPilot says it. Raises WorkError if it would run nowhere."""
        # Of a machine that is there already it would say no price.
        return self.text("launch", "--dryrun", "--yes", "--cluster", f"{name}-plan", *_by_name(secrets), str(task))

    def launch(self, cluster: str, task: Path, secrets: tuple[str, ...], managed: bool) -> int:
        """Find a machine, and start the task on it as a job. Returns SkyPilot's exit code.

        cluster: or the name of the managed job. secrets: names of variables. SkyPilot is in a session of its own, so
        that Ctrl-C doesn't cut it off half-way, and keeps the locks that are inherited until it is done.
        """
        command = ["jobs", "launch", "--name"] if managed else ["launch", "--cluster"]
        process = subprocess.Popen(
            [self._program, *command, cluster, "--detach-run", "--yes", *_by_name(secrets), str(task)],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=False,
        )
        return process.wait()

    def follow(self, cluster: str, job: dict, managed: bool) -> int:
        """Show a job's log until the job ends, or the connection breaks. Returns SkyPilot's exit code.

        Ctrl-C ends the showing, not the job.
        """
        command = self._logs(cluster, job, managed)
        process = subprocess.Popen(command, env=self._environment, start_new_session=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise

    def logged(self, job: dict) -> list[str]:
        """The lines of a managed job's log as far as it has come."""
        command = [*self._logs("", job, True), "--no-follow"]
        done = subprocess.run(command, capture_output=True, env=self._environment)
        return done.stdout.decode(errors="replace").splitlines()

    def end(self, cluster: str, name: str, managed: bool) -> None:
        """End the job, and take its machine down."""
        self.text("jobs", "cancel", "--yes", "--name", name) if managed else self.text("down", "--yes", cluster)

    def cancel(self, cluster: str, job: dict) -> None:
        """End the job, and leave its machine to others."""
        self.text("cancel", "--yes", cluster, str(job["job_id"]))

    def _logs(self, cluster: str, job: dict, managed: bool) -> list[str]:
        number = str(job["job_id"])
        return [self._program, *(["jobs", "logs", number] if managed else ["logs", cluster, number])]

    def _call(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self._program, *arguments], capture_output=True, text=True, env=self._environment, stdin=subprocess.DEVNULL
        )


def installed() -> Sky:
    """SkyPilot of this checkout. Raises ConfigError if it is not there."""
    if not PROGRAM.exists():
        raise ConfigError("SkyPilot is not there: run make sky, which gives it an environment of its own")
    return Sky()


def price_of(dryrun: str) -> float | None:
    """Dollars an hour of the chosen machine in what `sky launch --dryrun` prints; None if it names none."""
    found = re.search(r"(\d+\.\d+)\s+✔", plain(dryrun))
    return float(found[1]) if found else None


def plain(text: str) -> str:
    """Without a terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def rsync(name: str, paths: list[str], folder: Path) -> None:
    """Copy files and folders of a cluster's checkout into a folder; what isn't there is left out.

    Raises WorkError if the cluster cannot be reached.
    """
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


def _by_name(secrets: tuple[str, ...]) -> list[str]:
    """Secrets for SkyPilot's command line, which takes the values from the environment."""
    return [part for name in secrets for part in ("--secret", name)]
