"""As many processes hold the student as there are GPUs, or as memory has room for."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from apprentice import gpus, params, play, workers
from apprentice.pipeline import ROOT
from apprentice.serving import processes
from apprentice.workers import in_processes

QWEN_2B = 2_127_532_032
"""The numbers of Qwen3-VL-2B."""


@pytest.fixture
def base(tmp_path) -> Path:
    """A model of 3 million numbers in two files."""
    for part in (1, 2):
        save_file({"a": np.zeros((1000, part, 1000), np.float16)}, tmp_path / f"{part}.safetensors")
    return tmp_path


@pytest.fixture
def machine(monkeypatch):
    """One that has so many cores and so much free memory, and no GPU."""

    def make(cores: int, free: float) -> None:
        monkeypatch.setattr(processes, "cores", lambda: cores)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        monkeypatch.setenv(gpus.REHEARSAL, "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    return make


def test_a_models_size_is_that_of_its_files(base):
    assert processes.weights(base) == 3_000_000


@pytest.mark.parametrize(
    ("free", "dtype", "count"),
    [(64e9, "bfloat16", 10), (64e9, "float32", 5), (12e9, "bfloat16", 2), (10e9, "bfloat16", 1), (1e9, "bfloat16", 1)],
)
def test_no_more_models_than_memory_has_room_for(machine, monkeypatch, free, dtype, count):
    machine(32, free)
    monkeypatch.setattr(processes, "weights", lambda folder: QWEN_2B)
    assert processes.places(Path(), dtype, 100) == [None] * count


def test_a_small_model_is_held_on_all_cores_for_which_there_is_work(machine, base):
    machine(4, 8e9)
    assert processes.places(base, "float32", 100) == [None] * 4
    assert processes.places(base, "float32", 3) == [None] * 3
    assert processes.places(base, "float32", 0) == [None]


def test_each_gpu_has_one(machine, base, monkeypatch):
    machine(32, 256e9)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-7")
    assert processes.places(base, "bfloat16", 100) == ["0", "1", "GPU-7"]
    assert processes.places(base, "bfloat16", 2) == ["0", "1"]


def seen(call: int) -> tuple[str, int]:
    time.sleep(0.5)
    return os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()


def test_each_process_sees_its_own_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    found = set(in_processes(seen, [(call,) for call in range(6)], ["4", "5"]))
    assert {gpu for gpu, _ in found} == {"4", "5"} and len({process for _, process in found}) == 2


@pytest.fixture
def shares(monkeypatch, machine, tmp_path):
    """What agreement gives to its processes, on a machine with 32 cores."""

    def of(free: float, visible: str) -> tuple[list[tuple], list]:
        monkeypatch.syspath_prepend(ROOT / "stages")
        import agreement

        machine(32, free)
        monkeypatch.setattr(workers, "cores", lambda: 32)
        monkeypatch.setattr(processes, "weights", lambda folder: QWEN_2B)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        given = []

        def answered(work, calls, places=None):
            given.extend([list(calls), places])
            return [[(0, "noop", "noop")]]

        monkeypatch.setattr(workers, "in_processes", answered)
        monkeypatch.chdir(tmp_path)
        Path("data/sft").mkdir(parents=True)
        Path("data/sft/val.jsonl").write_text("{}\n" * 1024)
        Path("params.yaml").write_text(
            (ROOT / "params.yaml").read_text().replace("profile: tiny", "profile: qwen2b", 1)
        )
        agreement.main()
        return given[0], given[1]

    return of


def test_agreement_does_not_fill_a_laptop_with_models(shares):
    calls, places = shares(12e9, "")
    assert len(calls) == len(places) == 2 and {call[-1] for call in calls} == {16}


def test_agreement_asks_on_every_gpu(shares):
    calls, places = shares(512e9, "0,1")
    assert places == ["0", "1"] and sum(len(call[0]) for call in calls) == 1024


def test_the_students_benchmark_plays_on_every_gpu(machine, monkeypatch, base):
    """In process, where there is no vLLM: two processes on one GPU would take turns, each with the whole model."""
    monkeypatch.syspath_prepend(ROOT / "stages")
    import benchmark_student

    machine(32, 512e9)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.chdir(base)
    monkeypatch.setattr(play, "record", lambda *args, places=None: places)
    settings = params.load(ROOT / "params.yaml")
    benchmark = settings.benchmark.model_copy(update={"seeds": tuple(range(200))})
    (base / "models/base").mkdir(parents=True)
    assert benchmark_student.episodes("base", Path("models/base"), benchmark, settings.active) == ["0", "1"]
