"""A stage runs on another machine as it runs here; what would not work there is said before anything is started."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from checkouts import SETTINGS
from checkouts import checkout as made
from ruamel.yaml import YAML
from typer.testing import CliRunner

from apprentice import compute
from apprentice.cli import application
from apprentice.cloud import launch, machine, on_machine
from apprentice.cloud.machine import Sky
from apprentice.cloud.work import Work, gather, task, work
from apprentice.errors import ConfigError, WorkError
from apprentice.files import digest
from apprentice.pipeline import ROOT

SCHEMA = ROOT / "tests" / "slurm" / "schema.json"
"""SkyPilot's own, of the version in requirements-sky.lock; `make test-sky` compares it with the program's."""
PLACES = {
    "cloud": {"accelerators": "H200:2", "any_of": [{"infra": "nebius", "use_spot": True}, {"infra": "kubernetes"}]},
    "slurm": {"accelerators": "H200:4", "any_of": [{"infra": "slurm/mine"}], "disk_size": None, "cpus": "16+"},
    "anywhere": {"max_hourly_usd": 9.5, "environment": {"WANDB_MODE": "offline"}, "secrets": ["HF_TOKEN"]},
    "managed": {"managed": True, "transfer": "remote", "checkpoints": "s3://bucket/here", "memory": "64+"},
    "shared": {"checkpoints": "/shared/apprentice", "autostop_minutes": 5, "teardown": False},
}
DOING = Work("sft", (), "sft", ("models/base",), ("models/sft",), "apprentice-sft-0123456789")


def place(**settings) -> compute.Stage:
    return compute.Stage.model_validate(settings)


def problems(found: dict) -> list[str]:
    """What SkyPilot's schema has against a task."""

    def any_case(validator, allowed, value, schema):
        if value.lower() not in [name.lower() for name in allowed]:
            yield jsonschema.ValidationError(f"{value} is not one of {allowed}")

    checker = jsonschema.validators.extend(jsonschema.Draft7Validator, {"case_insensitive_enum": any_case})
    schemas = json.loads(SCHEMA.read_text())
    errors = [*checker(schemas["task"]).iter_errors(found)]
    errors += checker(schemas["resources"]).iter_errors(found["resources"])
    for mount in found.get("file_mounts", {}).values():
        errors += checker(schemas["storage"]).iter_errors(mount)
    return [error.message for error in errors]


@pytest.mark.parametrize("name", PLACES)
def test_a_task_is_one_by_skypilots_own_schema(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    found = task(DOING, place(**PLACES[name]), "/somewhere")
    assert problems(found) == []
    assert f"python -m {on_machine.__name__}" in found["run"] and "$APPRENTICE_LOCK" in found["setup"]


def test_the_committed_compute_yaml_makes_such_tasks(monkeypatch):
    monkeypatch.chdir(ROOT)
    for stage in compute.load().stages.values():
        assert problems(task(DOING, stage, "/somewhere")) == []


@pytest.mark.parametrize("path", sorted((ROOT / "sky").glob("*.yaml")), ids=lambda path: path.name)
def test_every_committed_task_file_is_one_by_skypilots_own_schema(path):
    assert problems({"resources": {}} | YAML(typ="safe").load(path.read_text())) == []


@pytest.mark.parametrize("change", [{"resources": {"gpu": 2}}, {"setups": "x"}, {"num_nodes": "two"}])
def test_a_task_that_is_none_is_noticed(monkeypatch, change):
    monkeypatch.chdir(ROOT)
    assert problems(task(DOING, place(), "/somewhere") | change)


def test_a_bucket_is_mounted_with_a_cache_and_holds_no_database(monkeypatch):
    """SQLite's locks and partial writes don't go through a mount: the stage's cache is on the machine's own disk."""
    monkeypatch.chdir(ROOT)
    found = task(DOING, place(checkpoints="s3://bucket/here"), "/somewhere")
    assert found["file_mounts"] == {"/checkpoints": {"source": "s3://bucket/here", "mode": "MOUNT_CACHED"}}
    assert "APPRENTICE_CACHE" not in found["envs"]


def test_secrets_are_in_a_task_by_name_only(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("COLOUR", "green")
    found = task(DOING, place(secrets=["HF_TOKEN"], environment={"COLOUR": None}), "/somewhere")
    assert found["secrets"] == {"HF_TOKEN": None} and "hush" not in json.dumps(found)
    assert found["envs"]["COLOUR"] == "green"


def test_the_price_is_that_of_the_chosen_machine():
    said = " Nebius  x  16  200  H200:2  9.10\n Slurm (a)  -  8  32  H200:2  7.00   \x1b[32m   ✔\x1b[0m   \n"
    assert machine.price_of(said) == 7.0
    assert machine.price_of("nothing") is None


def test_what_skypilot_says_beside_its_json_is_left_out(tmp_path):
    program = tmp_path / "sky"
    program.write_text(
        '#!/bin/sh\nprintf \'\\033[2mStarting a server.\\033[0m\\n[\\n  {"a": "[x]"}\\n]\\n\\033[0m done\\n\'\n'
    )
    program.chmod(0o755)
    assert Sky(program).json("status") == [{"a": "[x]"}]


@pytest.mark.parametrize("under_way", [[], [{"stage": "rl", "job": "RUNNING", "name": "apprentice-rl-1"}]])
def test_a_script_can_ask_what_is_under_way(monkeypatch, under_way):
    monkeypatch.setattr(launch, "status", lambda: under_way)
    assert json.loads(CliRunner().invoke(application, ["launch", "--status", "--json"]).stdout) == under_way
    said = CliRunner().invoke(application, ["launch", "--status"]).stdout
    assert ("apprentice-rl-1" if under_way else "nothing is under way") in said


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A committed checkout in which sft can run, its inputs a few bytes."""
    top = made(tmp_path / "checkout")
    monkeypatch.chdir(top)
    return top


def doing(lock: str = "requirements.lock") -> Work:
    return work("sft", [], lock)


def test_what_a_stage_reads_and_makes_is_what_dvc_yaml_says(checkout):
    found = doing()
    assert set(found.inputs) == {"data/sft/train.jsonl", "data/sft/val.jsonl", "models/base", *SETTINGS}
    assert {"models/sft", "metrics/sft.json", "metrics/plots/sft_val.csv"} <= set(found.outs)


def test_a_cluster_is_named_by_all_that_shapes_the_outputs(checkout):
    before = doing().name
    for name in ("README.md", "compute.yaml", "src/apprentice/cloud/launch.py"):
        Path(name).write_text(Path(name).read_text() + "\n# changed\n")
        assert doing().name == before, name
    for name in ("models/base/config.json", "src/apprentice/training/sft.py", "requirements.lock"):
        Path(name).write_text(Path(name).read_text() + "\n# changed\n")
        assert doing().name != before, name
        before = doing().name
    tree = YAML(typ="safe").load(Path("params.yaml").read_text())
    tree["profiles"]["tiny"]["sft"]["learning_rate"] = 0.5
    with Path("params.yaml").open("w") as file:
        YAML().dump(tree, file)
    assert doing().name != before


def test_a_cluster_is_named_by_the_versions_that_the_stage_computes_with(checkout):
    before, versions = doing().name, Path("src/apprentice/versions.yaml")
    pins = YAML(typ="safe").load(versions.read_text())
    for library, shapes in {"scipy": False, "torch": True}.items():
        with versions.open("w") as file:
            YAML().dump(pins | {library: "0.1"}, file)
        assert (doing().name != before) is shapes, library


def test_the_benchmark_of_a_student_goes_there_and_that_of_an_agent_stays_here(checkout):
    Path("models/sft").mkdir()
    student = work("benchmark_student", ["sft"], "requirements.lock")
    assert student.target == "benchmark_student@sft" and {"models/base", "models/sft"} < set(student.inputs)
    with pytest.raises(ConfigError, match=r"dvc.yaml has no stage that runs python stages/benchmark_student.py nobody"):
        work("benchmark_student", ["nobody"], "requirements.lock")
    Path("compute.yaml").write_text("stages: {benchmark: {where: sky}}\n")
    with pytest.raises(ConfigError, match=r"stages.benchmark: Input should be .*'benchmark_student'"):
        compute.load()


def test_the_student_without_an_adapter_is_sent_once(checkout, tmp_path):
    """dvc.yaml names models/base twice for it: as the base, and as the weights."""
    base = work("benchmark_student", ["base"], "requirements.lock")
    assert base.inputs.count("models/base") == 1
    gather(tmp_path / "sent", base, place(dirty=True), None, tmp_path / "nothing")
    assert digest(tmp_path / "sent/models/base") == digest(Path("models/base"))


def test_an_input_that_is_not_there_is_named(checkout):
    Path("data/sft/val.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"sft needs data/sft/val.jsonl: run dvc repro sft"):
        doing()
    Path("data/sft/val.jsonl").touch()
    Path("data/settings/student/sft.json").unlink()
    with pytest.raises(ConfigError, match=r"sft needs data/settings/student/sft.json: run dvc repro sft"):
        doing()
    Path("data/settings/student/sft.json").touch()
    with pytest.raises(ConfigError, match=r"there is no requirements-none.lock"):
        doing("requirements-none.lock")


def test_only_what_is_committed_is_sent_unless_said(checkout, tmp_path):
    unused = Sky()
    Path("stages/sft.py").write_text("# mine\n")
    Path("dvc.lock").touch()
    Path("metrics").mkdir()
    Path("metrics/split.json").touch()
    with pytest.raises(
        ConfigError, match=r"in no commit \(stages/sft.py\): commit them, or say so by stages.sft.dirty"
    ):
        launch.check(unused, doing(), place())
    Path("notes.txt").touch()
    with pytest.raises(ConfigError, match=r"notes.txt"):
        launch.check(unused, doing(), place())


def test_a_secret_that_is_not_set_is_named(checkout, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"stages.sft names HF_TOKEN, which is not set here: export HF_TOKEN=…"):
        launch.check(Sky(), doing(), place(secrets=["HF_TOKEN"]))


def test_the_remote_has_to_be_there_to_be_used(checkout):
    with pytest.raises(ConfigError, match="DVC has no default remote: dvc remote add --default"):
        launch.check(Sky(), doing(), place(transfer="remote"))


def stage(top: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "APPRENTICE_HERE"}
    environment["PYTHONPATH"] = str(top / "src")
    return subprocess.run(
        [sys.executable, "stages/sft.py", *arguments], cwd=top, env=environment, capture_output=True, text=True
    )


def test_a_stage_that_should_run_elsewhere_does_not_run_here(checkout):
    Path("compute.yaml").write_text("stages: {sft: {where: sky, lock: requirements.lock}}\n")
    done = stage(checkout)
    assert done.returncode == 2 and not Path("models/sft").exists()
    assert done.stderr.strip() == "SkyPilot is not there: run make sky, which gives it an environment of its own"
    assert "Train the adapter" in stage(checkout, "--help").stdout


def test_what_is_sent_has_the_inputs_and_neither_secrets_nor_rubbish(checkout, tmp_path):
    Path(".env").write_text("KEY=hush")
    Path(".gitignore").write_text(Path(".gitignore").read_text() + "/.env\n")
    Path(".dvc/config.local").write_text("[core]\n")
    gather(tmp_path / "sent", doing(), place(dirty=True), None, tmp_path / "nothing")
    sent = {str(file.relative_to(tmp_path / "sent")) for file in (tmp_path / "sent").rglob("*") if file.is_file()}
    assert {"models/base/config.json", "data/sft/train.jsonl", "stages/sft.py", ".apprentice/work.json"} <= sent
    assert {name for name in sent if name.startswith("data/settings/")} == SETTINGS
    assert not {".env", ".dvc/config.local"} & sent and not any(name.startswith(".git/") for name in sent)
    assert digest(tmp_path / "sent" / "models/base") == digest(Path("models/base"))


def test_a_launcher_that_is_killed_leaves_the_lock_to_skypilot(checkout, tmp_path):
    """Or a rerun would start a second machine while the first is being found."""
    program = checkout / machine.PROGRAM
    program.parent.mkdir(parents=True)
    program.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        'check*) echo \'{"default": ["Nebius"]}\' ;;\n'
        "*--dryrun*) ;;\n"
        "launch*) touch ../begun; while [ ! -e ../end ]; do sleep 0.05; done ;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    Path("compute.yaml").write_text("stages: {sft: {where: sky, lock: requirements.lock}}\n")
    launcher = subprocess.Popen([sys.executable, "-m", "apprentice", "launch", "sft"], cwd=checkout)
    lock = tmp_path / "cache" / "launch" / f"{doing().name}.lock"
    try:
        until(lambda: (tmp_path / "begun").exists() or launcher.poll() is not None)
        launcher.kill()
        assert launcher.wait() == -signal.SIGKILL and not free(lock)
    finally:
        launcher.kill()
        (tmp_path / "end").touch()
    until(lambda: free(lock))


def free(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def sent(tmp_path: Path, code: str, **told) -> Path:
    """A folder as a machine gets it, with a stage that is this code."""
    top = tmp_path / "sent"
    (top / "stages").mkdir(parents=True)
    (top / "stages" / "sft.py").write_text(f"from pathlib import Path\nimport os, sys, time\n{code}\n")
    (top / ".apprentice").mkdir()
    work = {
        "name": "mine",
        "stage": "sft",
        "target": "sft",
        "arguments": [],
        "inputs": [],
        "outs": [],
        "transfer": "rsync",
        "gpus": 0,
        "base": None,
        "digests": {},
        "checkpoints": None,
        "limit": None,
    } | told
    (top / ".apprentice" / "work.json").write_text(json.dumps(work))
    return top


def ran_there(top: Path, **environment: str) -> tuple[int, dict, str]:
    """The exit code, the record, and the log."""
    done = subprocess.run(
        [sys.executable, "-m", "apprentice.cloud.on_machine"],
        cwd=top,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    outcome = json.loads((top / ".apprentice" / "mine" / "outcome.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1].removeprefix(on_machine.MARK)) == outcome
    return done.returncode, outcome, done.stdout


def test_a_machine_records_what_was_made(tmp_path):
    code = "assert os.environ['APPRENTICE_HERE']\nPath('out').mkdir()\nPath('out/a').write_text(sys.argv[1])"
    top = sent(tmp_path, code, arguments=["made"], outs=["out"])
    code, outcome, _ = ran_there(top)
    assert code == outcome["exit_code"] == 0
    assert outcome["digests"] == {"out": digest(top / "out")} and (top / "out" / "a").read_text() == "made"


@pytest.mark.parametrize("code", [1, 2, 130, 7])
def test_a_machine_passes_the_stages_own_exit_code_on(tmp_path, code):
    ended, outcome, said = ran_there(sent(tmp_path, f"print('why', flush=True); sys.exit({code})"))
    assert ended == outcome["exit_code"] == code and "why" in said and not outcome["digests"]


def test_a_stage_that_costs_too_much_is_stopped(tmp_path):
    code = "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    Path('asked').touch()\n    sys.exit(130)"
    top = sent(tmp_path, code, limit={"usd": 10.0, "hourly_usd": 3600.0, "launch": "a"})  # ten seconds
    began = time.monotonic()
    assert ran_there(top)[0] == on_machine.TIME_IS_UP and (top / "asked").exists()
    assert time.monotonic() - began < 20
    (top / "asked").unlink()
    assert ran_there(top)[0] == on_machine.TIME_IS_UP and not (top / "asked").exists(), "a rerun has no more time"


def test_a_broken_output_is_not_taken(checkout, monkeypatch):
    def broken(name, paths, folder):
        (folder / "models").mkdir()
        (folder / "models/sft").write_text("half")

    monkeypatch.setattr(machine, "rsync", broken)
    outcome = {"digests": {"models/sft": "of the whole"}}
    with pytest.raises(WorkError, match="models/sft came broken; run the same command again"):
        launch.bring(DOING, place(), DOING.name, outcome)
    assert not Path("models/sft").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "name a stage"), (["sft", "--logs", "--stop"], "choose one"), (["collect"], "there is no stages.collect")],
)
def test_the_command_says_what_it_wants(checkout, arguments, said):
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(application, ["launch", *arguments], catch_exceptions=False, standalone_mode=False)
