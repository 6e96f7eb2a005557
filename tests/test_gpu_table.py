"""benchmarks/gpu.py: what goes wrong in a row is a row, and the next is measured."""

import os
import sys
import time

import pytest
import torch

from apprentice.pipeline import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu


def good(*found):
    yield from found


def full():
    yield {"decisions": 1.0}
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")


def broken():
    yield from ()
    raise KeyError("x")


def killed():
    yield from ()
    os._exit(9)


def hanging():
    yield from ()
    time.sleep(600)


def test_a_failure_is_a_row_and_the_next_one_is_measured(capsys, monkeypatch):
    worker, soon = gpu.Worker(), time.monotonic() + 500
    two = {"tokens": 12345.6, "mfu": 0.4321, "memory": 12.0}, {"decisions": 4.0}
    jobs = {
        "good": gpu.Job(["one", "two"], good, two),
        "full": gpu.Job(["two worlds", "four worlds", "eight worlds"], full, ()),
        "broken": gpu.Job(["a broken one"], broken, ()),
        "killed": gpu.Job(["a killed one"], killed, ()),
        "again": gpu.Job(["again"], good, two[:1]),
    }
    for job in jobs.values():
        gpu.run(job, "2b", worker, soon)
    monkeypatch.setattr(gpu, "MOST", 2.0)
    gpu.run(gpu.Job(["a slow one"], hanging, ()), "2b", worker, soon)
    gpu.run(gpu.Job(["a late one"], good, two[:1]), "2b", worker, time.monotonic() - 1)
    worker.end()
    lines = capsys.readouterr().out.splitlines()
    assert [line[5:39].strip() for line in lines] == [
        *(
            "one",
            "two",
            "two worlds",
            "four worlds",
            "a broken one",
            "a killed one",
            "again",
            "a slow one",
            "a late one",
        )
    ]
    assert "12,346" in lines[0] and "43.2%" in lines[0]
    assert "out of memory: CUDA out of memory" in lines[3] and "KeyError: 'x'" in lines[4]
    assert "memory was full" in lines[5] and "12,346" in lines[6] and "no time left" in lines[8]


@pytest.mark.parametrize("size", ["2b", "8b"])
def test_what_is_written_are_the_rates_with_the_profiles_settings(size, monkeypatch):
    from apprentice.cloud import estimate

    written = []
    monkeypatch.setattr(estimate, "record", lambda *args, **rates: written.append((args[:2], rates)))
    jobs = [
        gpu.Job(["sft, as the profile"], None, (), found=[{"tokens": 30_000.0}]),
        gpu.Job(["sft, QLoRA"], None, (), found=[{"tokens": 20_000.0}]),
        gpu.Job(["play in process, 32 worlds", "play in process, 64 worlds"], None, (), found=[{"decisions": 20.0}]),
        gpu.Job(["rl in process"], None, ()),
    ]
    gpu.record(size, "NVIDIA H100 80GB HBM3", jobs)
    rates = {"sft_tokens_per_second": 30_000.0, "rl_tokens_per_second": None, "play_decisions_per_second": 20.0}
    assert written == [((f"Qwen/Qwen3-VL-{size.upper()}-Instruct", "NVIDIA H100 80GB HBM3"), rates)]
