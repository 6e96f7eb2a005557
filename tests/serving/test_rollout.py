"""benchmarks/rollout.py: the server finds the memory free, and every row of its tables is there."""

import sys
from pathlib import Path

import pytest
import stand_in
from ruamel.yaml import YAML
from test_by_turns import SHORT, models  # noqa: F401  the fixture

from apprentice.pipeline import ROOT

sys.path.append(str(ROOT / "benchmarks"))


def test_no_model_is_held_in_the_process_that_starts_vllm(models, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A server takes 0.85 of the memory, and would find that of the model in process taken."""
    import rollout
    from small import checkout

    def held(*_, **__):
        pytest.fail("a model lies in the memory that the server is to take")

    top = checkout(tmp_path / "top", SHORT)
    (top / "models").symlink_to(models)
    with (top / "compute.yaml").open("w") as file:
        YAML(typ="safe").dump({"vllm": {"program": stand_in.program(tmp_path), "start_timeout": 300}}, file)
    monkeypatch.chdir(top)
    monkeypatch.setattr(rollout.in_process, "load", held)
    monkeypatch.setattr(rollout.loading, "load", held)
    rollout.main(Path("models/distill"), episodes=2, steps=2)
    said = capsys.readouterr().out
    assert all(name in said for name in ("ours, in process", "TRL, environm", "ours, on vLLM", "BALROG's way"))
