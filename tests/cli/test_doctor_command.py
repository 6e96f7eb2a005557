"""`apprentice doctor`: what is there is found, each gap says what it prevents, and no secret is shown."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import run, write_params
from endpoint import Answer, Server

from apprentice.pipeline import ROOT

SECRET = "sk-of-this-test-no-secret"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("compute.yaml", "requirements.lock", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".dvc").mkdir()
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "APPRENTICE_VLLM"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def findings(folder: Path, code: int = 0) -> dict[str, dict]:
    done = run(folder, "doctor", "--json")
    assert done.returncode == code, done.stderr
    return {finding["what"]: finding for finding in json.loads(done.stdout)}


def test_this_machine_can_run_the_pipeline(folder):
    found = findings(folder)
    for what in ("Python", "packages", "params.yaml", "compute.yaml", "checkout", "disk here", "ffmpeg"):
        assert found[what]["state"] == "ok", found[what]


def test_every_gap_says_what_it_prevents_and_what_to_do(folder):
    for finding in findings(folder).values():
        assert finding["state"] == "ok" or (finding["prevents"] and finding["remedy"]), finding
    shown = run(folder, "doctor").stdout
    assert "SkyPilot: prevents stages on machines elsewhere" in " ".join(shown.split())


def test_a_key_that_a_teacher_needs_is_missed_and_a_key_that_is_there_is_not_shown(folder, monkeypatch):
    write_params(folder, key_env="TEST_KEY")
    monkeypatch.delenv("TEST_KEY", raising=False)
    assert findings(folder, 1)["TEST_KEY"]["remedy"] == "export TEST_KEY=…"
    monkeypatch.setenv("TEST_KEY", SECRET)
    assert findings(folder)["TEST_KEY"]["state"] == "ok"
    done = run(folder, "doctor")
    assert SECRET not in done.stdout + done.stderr


def test_what_would_stop_dvc_repro_is_broken(folder):
    (folder / "params.yaml").write_text("profile: 7\n")
    shutil.rmtree(folder / ".dvc")
    found = findings(folder, 1)
    assert found["params.yaml"]["state"] == "broken" and "profile" in found["params.yaml"]["found"]
    assert found["checkout"]["state"] == "broken"


def test_a_model_of_the_hub_needs_gpus_and_the_hub(folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("profile: tiny", "profile: qwen2b", 1))
    with Server([Answer("", status=404)]) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/v1"))
        found = findings(folder, 1)
    assert found["GPU"]["state"] == found["student"]["state"] == "broken"
    assert "Qwen/Qwen3-VL-2B-Instruct" in found["student"]["found"]

    names = ("sft", "distill", "rl", "agreement", "benchmark_student")
    stages = {name: {"where": "sky", "accelerators": "H200:1"} for name in names}
    (folder / "compute.yaml").write_text(json.dumps({"stages": stages}))
    (folder / "models/base").mkdir(parents=True)
    (folder / "models/base/config.json").touch()
    found = findings(folder)
    assert found["GPU"]["state"] == "gap" and "student" not in found


def test_other_packages_than_the_locks_are_named(folder):
    (folder / "requirements.lock").write_text("# ours\nnosuchpackage==1\npillow==0.1\n")
    found = findings(folder)["packages"]
    assert found["state"] == "gap" and "pillow" in found["found"] and "nosuchpackage" in found["found"]


@pytest.mark.parametrize(
    ("status", "said"), [(200, "bucket answers"), (403, "may not read it"), (404, "no such bucket")]
)
def test_the_bucket_is_asked(folder, monkeypatch, status, said):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id-of-this-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with Server([Answer("", status=status)]) as server:
        endpoint = server.url.removesuffix("/v1")
        (folder / ".dvc/config").write_text(
            f"['remote \"storage\"']\n    url = s3://bucket/path\n    endpointurl = {endpoint}\n"
        )
        assert said in findings(folder)["S3 (storage)"]["found"]


def test_vllm_is_found_where_it_may_be(folder, monkeypatch):
    assert findings(folder)["vLLM"]["state"] == "gap"
    program = folder / ".venv-vllm/bin/vllm"
    program.parent.mkdir(parents=True)
    program.touch()
    assert findings(folder)["vLLM"]["found"] == str(program)
