"""compute.yaml says where stages run; what is wrong in it is said before anything starts, and it changes no result."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from apprentice import compute
from apprentice.errors import ConfigError
from apprentice.pipeline import ROOT


def written(tmp_path: Path, text: str) -> compute.Compute:
    (tmp_path / "compute.yaml").write_text(text)
    return compute.load(tmp_path / "compute.yaml")


def test_what_is_committed_runs_everything_here():
    found = compute.load(ROOT / "compute.yaml")
    assert found.stages and all(stage.where == "here" for stage in found.stages.values())
    assert found.stages["sft"].accelerators == "H200:2" and found.stages["rl"].accelerators == "H200:4"


def test_without_the_file_everything_runs_here(tmp_path):
    assert compute.load(tmp_path / "compute.yaml").stages == {}
    assert written(tmp_path, "# nothing\n").stages == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: {sft: {wher: sky}}", "stages.sft.wher: unknown key; known there: where, accelerators"),
        (
            "stages: {filter: {where: sky}}",
            "stages.filter: Input should be 'student', 'sft', 'distill', 'rl', 'agreement' or 'benchmark_student'",
        ),
        (
            "stages: {sft: {any_of: [{infra: nebius, zone: a}]}}",
            "stages.sft.any_of.0.zone: unknown key; known there: in",
        ),
        ("stages: {sft: {any_of: []}}", "any_of is empty"),
        ("stages: {sft: {any_of: [{infra: slurm, use_spot: true}]}}", "Slurm has no spot machines"),
        ("stages: {sft: {accelerators: 2}}", "stages.sft.accelerators: Input should be a valid string (it is 2)"),
        ("stages: {sft: {max_hourly_usd: 0}}", "stages.sft.max_hourly_usd: Input should be greater than 0"),
        ("stages: {sft: {managed: true}}", "managed needs transfer: remote"),
        ("stages: {sft: {managed: true, transfer: remote}}", "managed needs checkpoints"),
        (
            "stages: {sft: {checkpoints: 's3://b/c', any_of: [{infra: nebius}, {infra: runpod/US}]}}",
            "RunPod cannot mount the bucket s3://b/c: remove it from any_of, or write checkpoints: null",
        ),
        (
            "stages: {sft: {managed: true, transfer: remote, checkpoints: /a, machine: one}}",
            "managed jobs have machines of their own",
        ),
        ("stages: {sft: {checkpoints: here}}", "neither a bucket (s3://bucket/folder) nor a folder"),
        ("stages: {sft: {secrets: [A], environment: {A: b}}}", "A stands under both environment and secrets"),
        ("stages: [", "is not valid YAML"),
        ("- sft", "must be a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(tmp_path, text, said):
    with pytest.raises(ConfigError) as error:
        written(tmp_path, text)
    assert said in str(error.value)


@pytest.mark.parametrize("where", ["secrets: [sk-secret]", "environment: {A: [sk-secret]}"])
def test_a_secret_written_by_mistake_is_not_repeated(tmp_path, where):
    with pytest.raises(ConfigError) as error:
        written(tmp_path, f"stages: {{sft: {{{where}}}}}")
    assert "stages.sft." in str(error.value) and "sk-secret" not in str(error.value)


def test_the_machine_that_was_found_looks_no_further(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "stages: {sft: {where: sky}}")
    assert compute.runs_elsewhere("sft") and not compute.runs_elsewhere("rl")
    monkeypatch.setenv("APPRENTICE_HERE", "1")
    assert not compute.runs_elsewhere("sft")


def test_no_stage_depends_on_where_it_runs():
    pipeline = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in pipeline.items():
        stage = stage.get("do", stage)
        places = ("src/apprentice/compute", "src/apprentice/cloud", "compute.yaml")
        assert not [dep for dep in stage["deps"] if dep.startswith(places)], name
        assert "compute" not in str([stage["cmd"], stage.get("params")]), name
