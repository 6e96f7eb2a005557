"""GPUs that torch cannot use are said as such, before hours on the processor are paid at their price."""

import pytest
import torch

from apprentice import gpus
from apprentice.cli import doctor
from apprentice.errors import WorkError


@pytest.fixture
def machine(monkeypatch):
    """One whose driver counts so many GPUs, of which torch can use all or none."""

    def make(count: int, usable: bool) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(gpus, "_driver", lambda: "535.104.05")

    return make


def test_a_driver_that_is_too_old_is_named_with_the_cuda_that_it_lacks(machine):
    machine(2, usable=False)
    with pytest.raises(WorkError, match=r"2 GPUs, .* driver \(535.104.05\) is older than CUDA 13.0. Take a machine"):
        gpus.check(2)


def test_fewer_gpus_than_asked_for_are_too_few(machine):
    machine(1, usable=True)
    with pytest.raises(WorkError, match=r"2 GPUs were asked for, and torch .* finds 1 \(driver: 535.104.05\)"):
        gpus.check(2)


def test_each_gpu_is_tried(machine, monkeypatch):
    machine(2, usable=True)
    tried = []

    def zeros(size, device):
        tried.append(device)
        if device == "cuda:1":
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")
        return torch.ones(size)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(WorkError, match=r"GPU 1 does not work .CUDA error: uncorrectable ECC error .*; driver"):
        gpus.check()
    assert tried == ["cuda:0", "cuda:1"]


def test_without_gpus_nothing_is_wrong(machine):
    machine(0, usable=False)
    assert gpus.check() == 0


def test_rehearsed_gpus_need_no_driver(machine, monkeypatch):
    machine(0, usable=False)
    monkeypatch.setenv(gpus.REHEARSAL, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert gpus.check(2) == 2


def test_doctor_says_it_of_this_machine(machine):
    machine(2, usable=False)
    found = doctor._gpu()
    assert found.state == doctor.BROKEN and "535.104.05" in found.found and "CUDA_VISIBLE_DEVICES=" in found.remedy
    machine(0, usable=False)
    assert doctor._gpu().state == doctor.GAP
