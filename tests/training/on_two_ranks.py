"""Two ranks learn what one process learns, without DeepSpeed and with it: `make test-deepspeed`.

Minutes of CPU, so not a part of `make test`.
"""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small import checkout
from test_distill import WEIGHTS, distilled, taught
from test_rl import adapted, on_cores, run_and_last_adapter

__all__ = ["adapted", "taught"]  # fixtures
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is one rank")


EXACT = {"profiles.tiny.dtype": "float32"}
"""Rounded products would differ by more than the order of a sum."""


def exactly(advantage: str) -> dict:
    return EXACT | {"profiles.tiny.rl.advantage": advantage}


@pytest.fixture(scope="module")
def alone(adapted, tmp_path_factory):
    """By advantage: the folder where one rank has run rl, and its last adapter."""

    @cache
    def run(advantage: str) -> tuple[Path, dict[str, torch.Tensor]]:
        top = tmp_path_factory.mktemp(advantage) / "top"
        return top, run_and_last_adapter(top, adapted, 1, exactly(advantage))

    return run


@pytest.mark.parametrize("advantage", ["linear", "critic"])
def test_two_ranks_make_the_update_of_one(adapted, alone, tmp_path, advantage):
    (single, one), two = alone(advantage), run_and_last_adapter(tmp_path / "2", adapted, 2, exactly(advantage))
    start = load_file(adapted / "distill" / "adapter_model.safetensors")
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-4  # something was learnt
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0)
    first_iteration = [("iteration", "==", 0)]
    one, two = (
        pq.read_table(top / "data/rl/rollouts.parquet", filters=first_iteration) for top in (single, tmp_path / "2")
    )
    if advantage == "linear":
        assert one.equals(two)
    assert one.drop_columns("advantage").equals(two.drop_columns("advantage"))
    # the critic's larger system is solved on two threads by one rank
    np.testing.assert_allclose(one["advantage"].to_numpy(), two["advantage"].to_numpy(), rtol=1e-9)


def test_two_ranks_learn_what_one_learns(taught, tmp_path):
    one, two = (distilled(tmp_path / str(cores), taught, cores, EXACT) for cores in (1, 2))
    start, single, double = (
        load_file(path) for path in (taught / "models/sft" / Path(WEIGHTS).name, one / WEIGHTS, two / WEIGHTS)
    )
    assert max((single[name] - start[name]).abs().max() for name in start) > 1e-4  # something was learnt
    for name in single:
        torch.testing.assert_close(double[name], single[name], atol=2e-5, rtol=0)
    rounds = [json.loads((top / "metrics/distill.json").read_text())["rounds"] for top in (one, two)]
    assert rounds[0][0] == rounds[1][0] and [row["round"] for row in rounds[0]] == [0, 1]
    assert [row["teacher_share"] for row in rounds[0]] == [0.5, 0.25]
    card = (one / "models/distill/README.md").read_text()
    assert "labelled by" in card and "| expert | expert |" in card and str(tmp_path) not in card
    (checkpoint,) = one.glob("cache/distill/*/checkpoint-8")
    assert "rounds/1/rows.jsonl" in (checkpoint / "whole.json").read_text()


def test_two_ranks_teach_a_base_to_see_as_one_does(tmp_path):
    smaller = {"seeds": "100000-100007", "frames_per_seed": 10, "steps": 5, "batch_size": 16}
    changes = {f"profiles.tiny.student.pretraining.{name}": value for name, value in smaller.items()}
    found = []
    for cores in (1, 2):
        top = checkout(tmp_path / str(cores), EXACT | changes)
        done = on_cores(top, cores, "stages/student.py")
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(load_file(top / "models/base/model.safetensors"))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=1e-4, rtol=0)


def test_two_ranks_of_zero_make_the_update_of_one_process_without(adapted, alone, tmp_path):
    _, one = alone("critic")
    changes = exactly("critic") | {"profiles.tiny.rl.zero": {"stage": 2}}
    two = run_and_last_adapter(tmp_path / "2", adapted, 2, changes)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0)
