"""`make test-s3`: DVC's remote on a real S3 server: a colleague's clone, and a machine, get everything from there."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import SMALL, checkout, contents, environment

from apprentice import compute
from apprentice.cloud.launch import bring
from apprentice.cloud.work import gather, work
from apprentice.pipeline import ROOT

SETTINGS = SMALL | {
    "profiles.tiny.distill.rounds": 1,
    "profiles.tiny.rl.iterations": 1,
    "benchmark.agents": {"random": {"policy": "random"}},
    "benchmark.students": {"rl": "models/rl"},
}
KEY = secrets.token_hex()
SERVER = ROOT / ".venv-s3/bin/moto_server"
BUCKET = """
import boto3, sys
boto3.client("s3", endpoint_url=sys.argv[1], region_name="us-east-1").create_bucket(Bucket="bucket")
"""


@pytest.fixture(scope="module")
def server() -> str:
    """The address of an S3 server with an empty bucket."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # a rank for each core would be another import of TRL
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": KEY, "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys)
    process = subprocess.Popen(
        [SERVER, "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.1)
        subprocess.run([ROOT / ".venv-s3/bin/python", "-c", BUCKET, address], check=True)
        yield address
    finally:
        process.kill()
        process.wait()


def dvc(top: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=top,
        env=environment(top.parent / "cache"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (arguments, done.stderr[-3000:])
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def pushed(server, tmp_path_factory) -> Path:
    """A checkout where all has run and been pushed, the run-cache with it."""
    top = checkout(tmp_path_factory.mktemp("pushed") / "checkout", SETTINGS)
    dvc(top, "repro")
    # As the README says it.
    dvc(top, "remote", "add", "--default", "store", "s3://bucket/apprentice")
    dvc(top, "remote", "modify", "store", "endpointurl", server)
    dvc(top, "push", "--run-cache")
    return top


def clone(pushed: Path, folder: Path) -> Path:
    """What a colleague has from git: nothing of DVC's."""
    top = folder / "clone"
    shutil.copytree(pushed, top, ignore=shutil.ignore_patterns("cache", "tmp", "__pycache__"))
    for name in ("data", "models", "metrics"):
        shutil.rmtree(top / name)
    (top / "metrics").mkdir()
    for name in ("summary.json", "live.json"):
        shutil.copy(pushed / "metrics" / name, top / "metrics")
    assert not (top / ".dvc/cache").exists() and not (top / "models").exists()
    return top


def test_a_colleague_gets_every_out_and_runs_nothing(pushed, tmp_path):
    top = clone(pushed, tmp_path)
    dvc(top, "pull")
    for name in ("data", "models", "metrics"):
        assert contents(top / name) == contents(pushed / name)
    assert "Running stage" not in dvc(top, "repro")


def test_what_others_have_run_is_not_run_again(pushed, tmp_path):
    """By the run-cache: dvc.lock says nothing of it."""
    top = clone(pushed, tmp_path)
    (top / "dvc.lock").unlink()
    said = dvc(top, "repro", "--pull", "split")
    assert "Running stage" not in said and "is cached" in said
    assert contents(top / "data/sft") == contents(pushed / "data/sft")


def test_a_machine_pulls_its_inputs_and_pushes_its_outputs(pushed, tmp_path, monkeypatch):
    """All that `transfer: remote` does, with a folder for the machine."""
    top = clone(pushed, tmp_path)
    dvc(top, "pull", "settings", "split", "student")
    monkeypatch.chdir(top)
    place = compute.Stage(transfer="remote", lock="requirements.lock", dirty=True)
    doing = work("sft", [], place.lock)
    sent = tmp_path / "sent"
    gather(sent, doing, place, None, tmp_path / "nothing")
    assert not (sent / "models").exists() and KEY.encode() not in b"".join(contents(sent).values())
    done = subprocess.run(
        [sys.executable, "-m", "apprentice.cloud.on_machine"],
        cwd=sent,
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads((sent / ".apprentice" / doing.name / "outcome.json").read_text())
    shutil.rmtree(top / "metrics")
    bring(doing, place, doing.name, outcome)
    assert contents(top / "models/sft") == contents(sent / "models/sft") == contents(pushed / "models/sft")
    assert (top / "metrics/sft.json").read_bytes() == (pushed / "metrics/sft.json").read_bytes()
    assert KEY not in done.stdout + done.stderr
