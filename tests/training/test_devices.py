"""Batches are the same on any number of devices; ranks work together, fail together and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from apprentice import gpus
from apprentice.errors import ConfigError, WorkError
from apprentice.fingerprint import PACKAGE
from apprentice.params import Lora, Sft
from apprentice.pipeline import ROOT
from apprentice.training import devices, memory


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("batch", "micro"), [(32, 16), (32, 1), (30, 7), (16, 64), (1, 8), (7, 3)])
def test_a_batch_has_its_size_on_any_number_of_devices(monkeypatch, count, batch, micro):
    monkeypatch.setenv(gpus.REHEARSAL, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    ranks, rows, accumulation = devices.layout(batch, micro)
    assert ranks * rows * accumulation == batch
    assert ranks <= count and rows <= micro


def test_cores_share_a_batch_that_is_worth_it(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 4)
    assert devices.layout(64, 64) == (4, 16, 1)
    assert devices.layout(16, 64) == (2, 8, 1)
    assert devices.layout(8, 64) == (1, 8, 1)
    assert devices.layout(64, 64, most=2) == (2, 32, 1)


def read_rows(folder: Path) -> None:
    from torch.utils.data import DataLoader

    loader = DataLoader(_Importing(), 1, **devices.readers() | {"num_workers": 2})
    folder.joinpath("read").write_text(str([int(row) for row in loader]))


class _Importing:
    """Rows that say which process has imported this file: a reader that begins anew imports it again."""

    imported = os.getpid()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: int) -> int:
        return self.imported


def test_readers_of_rows_begin_with_what_their_rank_has_imported(tmp_path, monkeypatch):
    monkeypatch.setenv(gpus.REHEARSAL, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert devices.readers()["num_workers"]
    devices.launch(read_rows, 1, tmp_path, group=True)  # which spawns the rank
    first, second = json.loads(tmp_path.joinpath("read").read_text())
    assert first == second != os.getpid()


def add(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    mine = torch.tensor([torch.distributed.get_rank() + 1])
    torch.distributed.all_reduce(mine)
    (folder / str(torch.distributed.get_rank())).write_text(str(mine.item()))
    torch.distributed.destroy_process_group()


def test_ranks_find_each_other(tmp_path):
    devices.launch(add, 3, tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys("012", "6")


def fail() -> None:
    torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise ValueError("the disk is made of cheese")
    torch.distributed.barrier()
    time.sleep(600)


def test_a_rank_that_fails_ends_all_with_its_error():
    began = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="the disk is made of cheese"):
        devices.launch(fail, 2)
    assert time.monotonic() - began < 120


def refuse() -> None:
    if os.environ["RANK"] == "1":
        raise ConfigError("profiles.x is no good")
    time.sleep(600)


def test_an_error_of_ours_is_said_once_and_keeps_its_exit_code(capfd):
    with pytest.raises(SystemExit) as stopped:
        devices.launch(refuse, 2)
    assert stopped.value.code == 2
    assert capfd.readouterr().err.count("profiles.x is no good") == 1


def die() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def wait(folder: Path) -> None:
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)


def say_threads(folder: Path) -> None:
    (folder / os.environ.get("RANK", "alone")).write_text(str(torch.get_num_threads()))


@pytest.mark.parametrize(("ranks", "on"), [(1, None), (1, ()), (2, None)])
def test_a_rank_on_the_processor_computes_on_one_thread(tmp_path, ranks, on):
    before = torch.get_num_threads()
    try:
        devices.launch(say_threads, ranks, tmp_path, on=on)
    finally:
        torch.set_num_threads(before)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["1"] * ranks


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_the_parent(tmp_path, how):
    code = "import sys, pathlib, test_devices as t; t.devices.launch(t.wait, 2, pathlib.Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parent)
    deadline = time.monotonic() + 120
    while len(files := [file for file in tmp_path.iterdir() if file.read_text()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = [int(file.read_text()) for file in files]
    process.send_signal(how)
    process.wait(60)
    while any(map(alive, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def fill(gigabytes: int) -> None:
    torch.empty(gigabytes << 30, dtype=torch.uint8)


def test_full_memory_says_what_helps_first(capfd):
    relief = memory.relief("profiles.x.sft", Sft(micro_batch_size=8))
    order = ["micro_batch_size: 4", "gradient_checkpointing: true", "lora.quantization: nf4", "max_length below 2048"]
    order += ["lora.vision: false", "zero.stage: 2", "zero.stage: 3", "zero.offload: true"]
    places = [relief.index(step) for step in order]
    assert places == sorted(places) and "under profiles.x.sft" in relief
    with pytest.raises(WorkError, match=r"memory is full \(.*under profiles.x.sft: micro_batch_size: 4"):
        devices.launch(fill, 1, 1 << 20, relief=relief)
    with pytest.raises(SystemExit) as stopped:
        devices.launch(fill, 1, 1 << 20, group=True, relief=relief)
    assert stopped.value.code == 1 and "rank 0's memory is full" in capfd.readouterr().err


def exhaust() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_full_gpu_and_a_killed_rank_end_the_work_and_say_so_too():
    with pytest.raises(WorkError, match=r"CUDA out of memory.*try this"):
        devices.launch(exhaust, 1, relief="try this")
    with pytest.raises(WorkError, match=r"rank 1 was ended by SIGKILL; .*memory was full. try this"):
        devices.launch(die, 2, relief="try this")


def test_what_is_used_already_is_not_advised():
    used = Sft(micro_batch_size=1, gradient_checkpointing=True, lora=Lora(quantization="nf4", vision=False))
    relief = memory.relief("x", used)
    assert not any(word in relief for word in ("micro_batch", "checkpointing", "quantization", "vision", "stage: 3"))


def wait_long(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    devices.wait()
    rank = torch.distributed.get_rank()
    began = time.process_time()
    if rank == 0:
        time.sleep(4)
    devices.wait()
    (folder / str(rank)).write_text(str(time.process_time() - began))


def test_a_rank_that_waits_computes_nothing(tmp_path):
    """On the processor, too: its cores are the worlds'."""
    devices.launch(wait_long, 2, tmp_path)
    assert float((tmp_path / "1").read_text()) < 0.3


def test_ranks_wait_for_each_other_in_one_way_only():
    """accelerate's would be NCCL's barrier on GPUs, which spins on the card that a server plays on."""
    files = [*(PACKAGE / "training").glob("*.py"), ROOT / "stages/rl.py"]
    assert not [file.name for file in files if "wait_for_everyone" in file.read_text()]


def tell(folder: Path) -> None:
    import torch

    (folder / "rank").write_text(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']} {torch.cuda.is_initialized()}")


def test_a_parent_that_has_begun_cuda_decides_nothing_about_its_ranks(tmp_path, monkeypatch):
    """It goes on seeing the GPUs that it saw then: so one rank, too, is a process that has only its own GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices.layout(64, 64, on=["3"]) == (1, 64, 1)
    assert devices.layout(64, 16, on=["2", "3"]) == (2, 16, 2)
    devices.launch(tell, 1, tmp_path, on=["3"])
    pid, seen, begun = (tmp_path / "rank").read_text().split()
    assert (seen, begun) == ("3", "False") and int(pid) != os.getpid()
