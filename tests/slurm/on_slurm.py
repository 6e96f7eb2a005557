"""`make test-sky`: SkyPilot, as it is, runs the real sft stage on a one-node Slurm, and it is as if it ran here."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from small import SMALL, checkout, contents, environment

from apprentice.pipeline import ROOT

SCHEMA = ROOT / "tests/slurm/schema.json"
CACHE = Path(os.environ["HOME"]).parent
"""The folder of tests/slurm/start.sh."""
SHARED = CACHE / "shared"
SETTINGS = SMALL | {"profiles.tiny.sft.epochs": 8, "profiles.tiny.sft.early_stopping_patience": None}
OFFLINE = {"UV_OFFLINE": "1", "UV_NO_INDEX": "1", "UV_PYTHON_DOWNLOADS": "never", "UV_FIND_LINKS": f"{CACHE}/wheels"}
OFFLINE["UV_CACHE_DIR"] = "/home/student/packages"  # for all machines, as on a cluster where home is shared
REHEARSED = {"APPRENTICE_REHEARSAL": "1"}
"""Nothing stands behind the GPUs that Slurm counts."""
SECRET = "hush-4242"
yaml = YAML(typ="safe")


def compute(top: Path, **place) -> None:
    """Send sft and agreement to Slurm."""
    sft = {"where": "sky", "accelerators": "H200:2", "any_of": [{"infra": "slurm"}], "lock": "requirements.lock"}
    sft |= {
        "max_hourly_usd": 8.0,
        "max_total_usd": 5.0,
        "environment": OFFLINE | REHEARSED,
        "secrets": ["HF_TOKEN"],
        **place,
    }
    with (top / "compute.yaml").open("w") as file:
        YAML().dump({"stages": {"sft": sft, "agreement": sft}}, file)


def settings(top: Path, **changes) -> None:
    tree = yaml.load((top / "params.yaml").read_text())
    tree["profiles"]["tiny"]["sft"] |= changes
    with (top / "params.yaml").open("w") as file:
        yaml.dump(tree, file)


def committed(top: Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "--all"], cwd=top, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "--message", "test"], cwd=top, check=True)


def begin(top: Path, *command: str, **variables: str) -> subprocess.Popen:
    log = (top.parent / f"{top.name}.log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=top,
        env=environment(top.parent / "cache") | {"HF_TOKEN": SECRET} | variables,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job has it ignored
    )


def log(top: Path) -> str:
    return (top.parent / f"{top.name}.log").read_text(errors="replace")


def ended(top: Path, process: subprocess.Popen, seconds: float = 600) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(log(top)[-5000:]) from None


def until(top: Path, process: subprocess.Popen, condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log(top)[-5000:]
        time.sleep(0.2)


def steps(said: str) -> list[int]:
    """Those that sft has said it has done."""
    return [int(step) for step in re.findall(r"\bsft (\d+)/\d+[,:]", said)]


def sky(*arguments: str) -> str:
    done = subprocess.run([ROOT / ".venv-sky/bin/sky", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def jobs() -> list[str]:
    """Names of what runs on the cluster."""
    done = subprocess.run(["squeue", "--noheader", "--format=%j"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def at_work() -> set[str]:
    """Programs of the node's user, but for the connections that SkyPilot keeps open for a while."""
    done = subprocess.run(["ps", "--user", "student", "--format", "comm="], capture_output=True, text=True)
    return set(done.stdout.split()) - {"sshd"}


def checkpoints() -> int:
    return len(list(SHARED.glob("*/kept/*.tar")))


def locked(top: Path) -> dict:
    """dvc.lock without how long a stage took, which nothing depends on."""
    stages = yaml.load((top / "dvc.lock").read_text())["stages"]
    for stage in stages.values():
        stage["outs"] = [out for out in stage["outs"] if not out["path"].startswith("metrics/times/")]
    return stages


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A checkout where the pipeline has run up to sft, on this machine."""
    folder = tmp_path_factory.mktemp("here")
    top = checkout(folder / "here", SETTINGS)
    (top / "compute.yaml").unlink()
    committed(top)
    process = begin(top, "dvc", "repro", "sft", CUDA_VISIBLE_DEVICES="0,1", **REHEARSED)  # two ranks, as there
    assert ended(top, process) == 0, log(top)[-5000:]
    return top


@pytest.fixture(scope="module")
def there(here, tmp_path_factory) -> Path:
    """Another, with all that sft needs, which sends it to Slurm."""
    top = checkout(tmp_path_factory.mktemp("there") / "there", SETTINGS)
    SHARED.mkdir(mode=0o777, exist_ok=True)
    SHARED.chmod(0o1777)
    compute(top, checkpoints=str(SHARED))
    (top / ".venv-sky").symlink_to(ROOT / ".venv-sky")
    for name in ("data", "models/base", "metrics", ".dvc/cache/files"):  # but nothing of what has been run
        shutil.copytree(here / name, top / name)
    lock = yaml.load((here / "dvc.lock").read_text())
    made = lock["stages"].pop("sft")["outs"]
    with (top / "dvc.lock").open("w") as file:
        YAML().dump(lock, file)
    for out in made:
        if out["path"].startswith("metrics/"):
            (top / out["path"]).unlink()
    committed(top)
    return top


def test_the_schema_that_task_files_are_checked_by_is_skypilots_own():
    code = (
        "import json; from sky.utils import schemas; "
        "print(json.dumps({'task': schemas.get_task_schema(), 'resources': schemas.get_resources_schema(), "
        "'storage': schemas.get_storage_schema()}))"
    )
    done = subprocess.run([ROOT / ".venv-sky/bin/python", "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(SCHEMA.read_text())


def test_a_price_over_the_limit_starts_nothing(there):
    compute(there, checkpoints=str(SHARED), max_hourly_usd=5.0)
    assert ended(there, begin(there, "dvc", "repro", "sft")) != 0
    assert "max_hourly_usd is $5.00, and the cheapest machine is $7.00 an hour" in log(there)
    assert not jobs()
    compute(there, checkpoints=str(SHARED))


def test_a_machine_taken_away_is_replaced_and_training_goes_on(there):
    process = begin(there, "dvc", "repro", "sft")
    until(there, process, lambda: checkpoints() > 0)
    (name,) = jobs()
    subprocess.run(["scancel", "--name", name], check=True)
    assert ended(there, process) != 0
    assert "sft" not in yaml.load((there / "dvc.lock").read_text())["stages"]
    assert not (there / "models/sft").exists()


def test_ctrl_c_leaves_it_running_and_a_rerun_follows_it(there):
    before = len(log(there))
    process = begin(there, "dvc", "repro", "sft")
    until(there, process, lambda: "Streaming logs" in log(there)[before:])
    os.killpg(process.pid, signal.SIGINT)
    assert ended(there, process) != 0
    assert "goes on; run the same command again to follow it" in log(there)
    assert len(jobs()) == 1 and not (there / "models/sft").exists()
    status = begin(there, "apprentice", "launch", "--status")
    assert ended(there, status) == 0 and re.search(r"sft +(RUNNING|SUCCEEDED) +apprentice-sft-", log(there))
    shown = len(log(there))
    logs = begin(there, "apprentice", "launch", "sft", "--logs")
    until(there, logs, lambda: "Streaming logs" in log(there)[shown:])
    os.killpg(logs.pid, signal.SIGINT)
    logs.wait(60)
    assert len(jobs()) == 1

    again = begin(there, "dvc", "repro", "sft")
    assert ended(there, again) == 0, log(there)[-5000:]
    assert "which was started before" in log(there)
    assert steps(log(there)[before:])[0] > steps(log(there)[:before])[0], "it began anew"


def test_what_comes_back_is_as_if_it_had_run_here(here, there):
    assert contents(there / "models/sft") == contents(here / "models/sft")
    assert (there / "metrics/sft.json").read_bytes() == (here / "metrics/sft.json").read_bytes()
    for name in ("sft_train", "sft_val"):
        path = f"metrics/plots/{name}.csv"
        assert (there / path).read_bytes() == (here / path).read_bytes()
    assert locked(there) == locked(here)


def test_moving_a_stage_reruns_nothing(there):
    (there / "compute.yaml").unlink()
    process = begin(there, "dvc", "repro", "sft")
    assert ended(there, process) == 0 and "Running stage 'sft'" not in log(there)[-600:]
    compute(there)


def test_a_managed_job_is_planned(there):
    compute(there, managed=True, transfer="remote", checkpoints=str(SHARED), dirty=True)
    subprocess.run([sys.executable, "-m", "dvc", "remote", "add", "-d", "store", "s3://b"], cwd=there, check=True)
    assert ended(there, begin(there, "apprentice", "launch", "sft", "--plan")) == 0, log(there)[-5000:]
    assert "Dryrun finished" in log(there)[-600:] and "autostop" not in log(there)[-3000:]
    compute(there)


def test_a_failing_stage_returns_its_code_and_its_log_and_another_uses_its_machine(there):
    settings(there, max_length=1)
    committed(there)
    compute(there, machine="one", autostop_minutes=10)
    assert ended(there, begin(there, "apprentice", "launch", "sft")) == 1
    said = log(there)
    assert "has no row of at most 1 tokens" in said and "ended with exit code 1" in said
    machines = jobs()
    assert len(machines) == 1 and machines[0].startswith("apprentice-one-")

    assert ended(there, begin(there, "apprentice", "launch", "agreement")) == 0, log(there)[-5000:]
    assert (there / "metrics/plots/agreement.csv").exists() and jobs() == machines
    assert ended(there, begin(there, "apprentice", "launch", "agreement", "--stop")) == 0
    assert ended(there, begin(there, "apprentice", "launch", "--status")) == 0
    assert log(there).endswith("nothing is under way\n")


def test_a_machine_without_the_gpus_is_taken_down(there):
    compute(there, environment=OFFLINE)  # without the word that they are rehearsed
    assert ended(there, begin(there, "apprentice", "launch", "sft")) == 1
    assert "2 GPUs were asked for, and torch" in log(there) and "was taken down" in log(there)[-600:]
    assert not jobs()


def test_when_the_money_is_used_up_the_checkpoints_come_home(there):
    settings(there, max_length=512, learning_rate=1e-3, epochs=400)
    committed(there)
    compute(there, accelerators="H200:1", max_total_usd=0.15)  # two and a half minutes of one core
    assert ended(there, begin(there, "apprentice", "launch", "sft")) == 1
    assert "max_total_usd is used up" in log(there)[-600:] and not jobs()
    assert list((there.parent / "cache").glob("sft/*/checkpoint-*/whole.json"))


def test_more_money_goes_on_from_them_until_it_is_stopped(there):
    compute(there, accelerators="H200:1")
    before = len(log(there))
    process = begin(there, "apprentice", "launch", "sft")
    until(there, process, lambda: steps(log(there)[before:]))
    assert steps(log(there)[before:])[0] > 10, "it began anew"
    stop = begin(there, "apprentice", "launch", "sft", "--stop")
    assert ended(there, stop) == 0 and ended(there, process) == 1, log(there)[before:]


def test_nothing_stays(there):
    assert json.loads(sky("status", "-o", "json")) == []
    end = time.monotonic() + 60
    while jobs() or at_work():
        assert time.monotonic() < end, at_work()
        time.sleep(1)
    assert SECRET not in log(there)
    assert not list((there.parent / "cache" / "launch").glob("*.json"))
