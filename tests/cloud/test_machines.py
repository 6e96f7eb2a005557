"""What happens on machines and between them. SkyPilot has a stand-in, whose machines are folders and whose jobs run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkouts import checkout as made
from ruamel.yaml import YAML

from apprentice import compute, gpus
from apprentice.cache import cache_folder
from apprentice.cloud import kept, launch, machine, on_machine
from apprentice.cloud.machine import Sky
from apprentice.cloud.work import work
from apprentice.errors import ConfigError, WorkError
from apprentice.files import digest
from apprentice.ledger import Ledger
from apprentice.params import HubStudent

STAGE = """
import os, sys, time
from pathlib import Path
from apprentice.ledger import Ledger

run = Path(os.environ["APPRENTICE_CACHE"], "sft", "run")
done = max((int(mark.parent.name[11:]) for mark in run.glob("checkpoint-*/whole.json")), default=0)
print("goes on from", done, flush=True)
with Ledger("played") as ledger:
    ledger.add(str(done), b"episode")
for step in range(done + 1, 4):
    if step == int(os.environ.get("STOP_AT", 0)):
        time.sleep(float(os.environ.get("FOR", 0)))
        sys.exit(7)
    (run / f"checkpoint-{step}").mkdir(parents=True)
    (run / f"checkpoint-{step}" / "weights").write_text(str(step))
    (run / f"checkpoint-{step}" / "whole.json").touch()
for out in OUTS:
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("made")
"""
"""A stage with three checkpoints, and an episode in the ledger for each try."""


class Machines(Sky):
    """SkyPilot, with a folder for each machine; a job runs while it is launched."""

    def __init__(self, folder: Path):
        self.folder, self.known, self.launched, self.ended, self.log = folder, {}, [], [], ""

    def json(self, *arguments):
        assert arguments[0] == "check"
        return {"default": ["nebius"]}

    def jobs(self, cluster):
        return self.known.get(cluster, [])

    def job(self, cluster, name, managed):
        return super().job(name if managed else cluster, name, False)

    def spent(self, name):
        return 0.0

    def dryrun(self, name, task, secrets):
        return "3600.00  ✔"  # a dollar a second

    def launch(self, cluster, task, secrets, managed):
        found = YAML(typ="safe").load(task.read_text())
        self.launched.append((cluster, found))
        shutil.copytree(found["workdir"], self.folder / cluster, dirs_exist_ok=True)
        variables = {name: value for name, value in os.environ.items() if name != "APPRENTICE_CACHE"}
        done = subprocess.run(
            [sys.executable, "-m", "apprentice.cloud.on_machine"],
            cwd=self.folder / cluster,
            env=variables | found["envs"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log += done.stdout
        job = {"job_id": len(self.launched), "job_name": found["name"]}
        self.known.setdefault(cluster, []).append(job | {"status": "FAILED" if done.returncode else "SUCCEEDED"})
        return 0

    def follow(self, cluster, job, managed):
        return 0

    def logged(self, job):
        return self.log.splitlines()

    def end(self, cluster, name, managed):
        self.ended.append(cluster)
        self.known.pop(cluster, None)
        shutil.rmtree(self.folder / cluster, ignore_errors=True)

    def rsync(self, cluster, paths, folder):
        for path in paths:
            source, target = self.folder / cluster / path, folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            elif source.exists():
                shutil.copy(source, target)


@pytest.fixture
def sky(tmp_path, monkeypatch) -> Machines:
    """The stand-in, beside a checkout whose stages are small."""
    top = made(tmp_path / "checkout")
    monkeypatch.chdir(top)
    found = Machines(tmp_path / "machines")
    monkeypatch.setattr(machine, "installed", lambda: found)
    monkeypatch.setattr(machine, "rsync", found.rsync)
    monkeypatch.setattr(launch, "_PATIENCE", 0.1)
    for name, arguments in (("sft", []), ("agreement", []), ("benchmark_student", ["base"])):
        outs = work(name, arguments, "requirements.lock").outs if name == "sft" else []
        Path(f"stages/{name}.py").write_text(STAGE.replace("OUTS", repr(outs)))
    return found


def place(**settings) -> compute.Stage:
    return compute.Stage.model_validate({"dirty": True, "lock": "requirements.lock"} | settings)


def sft(**settings) -> int:
    return launch.run("sft", [], place(**settings), None)


def checkpoints() -> list[str]:
    """Those in the user's cache."""
    return sorted(path.name for path in cache_folder().glob("sft/run/checkpoint-*"))


def records() -> list[Path]:
    return [path for path in (cache_folder() / "launch").iterdir() if path.suffix != ".lock"]


def test_when_the_money_is_used_up_the_checkpoints_come_home_and_more_money_goes_on_from_them(sky):
    with pytest.raises(WorkError, match=r"max_total_usd is used up.* goes on from the last checkpoint, which is here"):
        sft(max_total_usd=15, environment={"STOP_AT": "3", "FOR": "600"})
    assert sky.ended and not sky.known, "the machine costs no more"
    assert checkpoints() == ["checkpoint-1", "checkpoint-2"] and not Path("models/sft").exists()
    assert sft(max_total_usd=100) == 0
    assert "goes on from 2" in sky.log and Path("models/sft").read_text() == "made"
    assert not records() and not sky.known


def test_when_a_stage_fails_its_checkpoints_come_home_too(sky):
    assert sft(environment={"STOP_AT": "2"}) == 7
    assert checkpoints() == ["checkpoint-1"] and not sky.known
    assert sft() == 0 and "goes on from 1" in sky.log
    with Ledger("played") as ledger:
        assert ledger.keys() == {"0", "1"}, "what was played comes home, in the end as well"


def test_a_kill_while_they_come_home_loses_nothing(sky, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(launch.kept, "unpack", killed)
        assert sft(environment={"STOP_AT": "2"}) == 130
    assert sky.known and not sky.ended, "the machine has them still"
    assert sft() == 7 and len(sky.launched) == 1
    assert checkpoints() == ["checkpoint-1"] and sky.ended
    assert sft() == 0 and "goes on from 1" in sky.log


def test_a_job_that_ends_without_a_word_leaves_what_it_had_kept(sky, monkeypatch):
    """Killed, with what is around it: what was packed until then is there."""
    monkeypatch.setattr(launch, "_outcome", lambda *_: None)
    with pytest.raises(WorkError, match="before the stage had ended"):
        sft(environment={"STOP_AT": "3"})
    assert checkpoints() == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("shared", [{"machine": "mine"}, {"teardown": False}, {}])
def test_a_machine_whose_gpus_do_not_work_is_taken_down_before_anything_runs(sky, shared):
    """Here it has none at all."""
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    with pytest.raises(WorkError, match="was taken down, since its GPUs cannot be used"):
        sft(accelerators="H200:2", environment=environment, **shared)
    assert "2 GPUs were asked for, and torch" in sky.log and "driver: " in sky.log
    assert "goes on from" not in sky.log and not sky.known


def test_rehearsed_gpus_are_as_good(sky):
    environment = {"CUDA_VISIBLE_DEVICES": "0,1", gpus.REHEARSAL: "1"}
    assert sft(accelerators="H200:2", environment=environment) == 0


def test_what_was_started_as_a_managed_job_is_followed_as_one(sky, monkeypatch, tmp_path):
    """compute.yaml may have changed since; the same work would be started, and paid for, twice."""
    managed = {"managed": True, "transfer": "remote", "checkpoints": str(tmp_path / "shared")}
    monkeypatch.setattr(launch, "dvc", lambda *_: "core.remote=here")
    monkeypatch.setattr(launch, "_follow", lambda *_: sys.exit(1))
    with pytest.raises(SystemExit):
        sft(**managed)
    asked = []
    monkeypatch.setattr(launch, "_follow", lambda sky, doing, place, on: asked.append(place) or sys.exit(1))
    with pytest.raises(SystemExit):
        sft()
    assert len(sky.launched) == 1 and asked[0].managed and asked[0].transfer == "remote"


def test_stages_share_a_machine_one_after_the_other(sky):
    shared = place(machine="benchmark", autostop_minutes=10)
    for stage, arguments in (("agreement", []), ("benchmark_student", ["base"])):
        shutil.copytree("models/base", "models/sft", dirs_exist_ok=True)
        doing = work(stage, arguments, "requirements.lock")
        text = Path(f"stages/{stage}.py").read_text()
        Path(f"stages/{stage}.py").write_text(text.replace("[]", repr(doing.outs)))
        assert launch.run(stage, arguments, shared, None) == 0
        assert all(Path(out).read_text() == "made" for out in doing.outs)
    (first, task), (second, _) = sky.launched
    assert first == second and first.startswith("apprentice-benchmark-")
    assert not sky.ended and task["resources"]["autostop"] == {"idle_minutes": 10, "down": True}
    assert launch.run("benchmark_student", ["base"], shared, None) == 0 and len(sky.launched) == 3, (
        "not the earlier outcome"
    )
    other = place(machine="benchmark", accelerators="H100:1")
    assert launch.cluster(doing, other) != first, "a machine of another kind is another machine"


def test_a_stage_waits_for_another_that_is_at_work_on_their_machine(sky, monkeypatch):
    """It was left by Ctrl-C: to send something else would replace its files under it."""
    shared, looks = place(machine="benchmark"), []
    on = launch.cluster(work("sft", [], "requirements.lock"), shared)

    def others(cluster, name):
        looks.append(cluster)
        assert not sky.launched
        return ["apprentice-agreement-1"] if len(looks) < 3 else []

    monkeypatch.setattr(sky, "others", others)
    assert launch.run("sft", [], shared, None) == 0
    assert looks == [on] * 3


def test_a_shared_machine_counts_the_money_of_each_work(sky):
    shared = {"machine": "mine", "environment": {"STOP_AT": "3", "FOR": "600"}}
    with pytest.raises(WorkError, match="max_total_usd is used up"):
        sft(max_total_usd=15, **shared)
    assert not sky.ended
    with pytest.raises(ConfigError, match=r"max_total_usd is \$15.00, and \$1\d.\d\d are spent: raise it"):
        sft(max_total_usd=15, **shared)
    assert sft(max_total_usd=100, machine="mine") == 0 and "goes on from 2" in sky.log


def test_a_hubs_student_is_downloaded_there_and_not_sent(sky, monkeypatch, tmp_path):
    student = HubStudent(model="Qwen/Qwen3-VL-2B-Instruct", revision="a" * 40)
    doing = work("sft", [], "requirements.lock", student)
    assert "models/base" not in doing.inputs and doing.name == work("sft", [], "requirements.lock").name
    top = tmp_path / "sent"
    launch.gather(top, doing, place(), None, tmp_path / "nothing")
    told = json.loads((top / ".apprentice/work.json").read_text())
    assert not (top / "models/base").exists() and told["digests"]["models/base"] == digest(Path("models/base"))
    monkeypatch.chdir(top)
    asked = []

    def snapshot_download(model, revision, local_dir):
        asked.append((model, revision))
        Path(local_dir, ".cache").mkdir(parents=True)
        Path(local_dir, "config.json").write_text(content)

    monkeypatch.setattr("apprentice.student.hub.snapshot_download", snapshot_download)
    content = "other weights"
    with pytest.raises(WorkError, match=r"downloaded from Qwen/Qwen3-VL-2B-Instruct at a{40}, is not the one"):
        on_machine._complete(told)
    content = "models/base/config.json"  # as it is in the checkout
    on_machine._complete(told)
    on_machine._complete(told)
    assert asked == [(student.model, student.revision)] * 2, "what is there already is not downloaded again"
    (top / "data/sft/val.jsonl").write_text("half")
    with pytest.raises(WorkError, match=r"data/sft/val.jsonl is not here as it was sent"):
        on_machine._complete(told)


def test_what_dvc_repro_writes_is_sent_though_it_is_in_no_commit(sky, tmp_path):
    """Of dvc.lock, `dvc pull` takes what to bring; compute.yaml has the settings of vLLM."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "rm", "--quiet", "--cached", "--ignore-unmatch", "dvc.lock", "compute.yaml"], check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "--message", "without"], check=True)
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    launch.gather(
        tmp_path / "sent", work("sft", [], "requirements.lock"), place(dirty=False), None, tmp_path / "nothing"
    )
    assert (tmp_path / "sent/dvc.lock").exists() and (tmp_path / "sent/compute.yaml").exists()


def sent(tmp_path: Path, folder: str, **told) -> Path:
    """Another machine with the same work."""
    doing = work("sft", [], "requirements.lock")
    top = tmp_path / folder
    launch.gather(top, doing, place(checkpoints=str(tmp_path / "shared")), told.get("limit"), tmp_path / "nothing")
    return top


def begin(top: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "apprentice.cloud.on_machine"],
        cwd=top,
        env=os.environ | environment,
        stdout=(top / "log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def test_a_machine_that_is_taken_away_leaves_its_checkpoints_and_its_bill(sky, tmp_path):
    """A managed job that SkyPilot starts again on another: it goes on, and has no new budget."""
    limit = {"usd": 60.0, "hourly_usd": 3600.0, "launch": "managed"}
    first = sent(tmp_path, "first", limit=limit)
    (shared,) = {path.parent for path in first.glob(".apprentice/*/outcome.json")}
    place, process = tmp_path / "shared" / shared.name, begin(first, STOP_AT="3", FOR="600")
    end = time.monotonic() + 60
    while not list(place.glob("kept/*.tar")):
        assert process.poll() is None and time.monotonic() < end, (first / "log").read_text()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (place / "spent.json").write_text(json.dumps({"launch": "managed", "usd": 45.0}))  # written each minute

    second = sent(tmp_path, "second", limit=limit)
    began = time.monotonic()
    assert begin(second, STOP_AT="3", FOR="600").wait(120) == on_machine.TIME_IS_UP
    assert "goes on from 2" in (second / "log").read_text() and time.monotonic() - began < 40
    assert json.loads((place / "spent.json").read_text())["usd"] > 59

    third = sent(tmp_path, "third", limit=limit)
    assert begin(third).wait(120) == on_machine.TIME_IS_UP, "nothing is left"
    fourth = sent(tmp_path, "fourth", limit=limit | {"usd": 600.0})
    assert begin(fourth).wait(120) == 0 and (fourth / "models/sft").exists()


def test_a_file_that_a_kill_cut_short_is_passed_over(tmp_path):
    cache, folder, there = tmp_path / "cache", tmp_path / "kept", tmp_path / "there"
    for step in (1, 2):
        checkpoint = cache / "sft/run" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(bytes([step]) * 50_000)
        (checkpoint / "whole.json").touch()
        kept.pack(cache, folder)
    newest = folder / "2.tar"
    for size in (10, 20_000, 60_000, newest.stat().st_size - 11_000):
        newest.write_bytes(newest.read_bytes()[:size])
        assert kept.unpack(folder, there)
        assert sorted(path.name for path in there.glob("sft/run/*")) == ["checkpoint-1"]
        kept.pack(cache, tmp_path / "again")
        shutil.copy(tmp_path / "again/1.tar", newest)
        shutil.rmtree(tmp_path / "again")
    assert kept.unpack(folder, there) and len(list(there.glob("sft/run/*"))) == 2


def test_what_is_unfinished_is_not_kept(tmp_path):
    cache = tmp_path / "cache"
    for name in (
        "sft/run/checkpoint-1/weights",
        "serve/a/0.log",
        "rl/run/.partial-evaluated/x",
        "rl/run/critics/0.npy",
    ):
        (cache / name).parent.mkdir(parents=True)
        (cache / name).touch()
    kept.pack(cache, tmp_path / "kept")
    assert kept.unpack(tmp_path / "kept", tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").rglob("*") if path.is_file()] == ["0.npy"]


def test_two_ledgers_become_one(tmp_path, monkeypatch):
    for folder, keys in {"here": "ab", "there": "bc"}.items():
        monkeypatch.setenv("APPRENTICE_CACHE", str(tmp_path / folder))
        with Ledger("x") as ledger:
            for key in keys:
                ledger.add(key, folder.encode())
    kept.pack(tmp_path / "there", tmp_path / "kept", checkpoints=False)
    assert kept.unpack(tmp_path / "kept", tmp_path / "here")
    monkeypatch.setenv("APPRENTICE_CACHE", str(tmp_path / "here"))
    with Ledger("x") as ledger:
        assert list(ledger.records("abc")) == [b"here", b"here", b"there"]
