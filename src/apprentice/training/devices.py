"""The ranks of a training stage: one process for each GPU, or for each core where there is none."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import distributed, multiprocessing

from apprentice import gpus
from apprentice.errors import ConfigError, WorkError, fail
from apprentice.progress import quiet
from apprentice.workers import cores, end_with_parent

_LEAST = 8
"""Rows of a batch that a core should have: below that a step is all overhead."""


def layout(
    batch_size: int, micro_batch_size: int, most: int | None = None, on: Sequence[str] | None = None
) -> tuple[int, int, int]:
    """(ranks, rows at once on each, steps of accumulation) that make up a batch of this size on this machine.

    The product is always batch_size, so that the same settings train alike on any number of devices.
    most: ranks, where there is no work for more. on: the GPUs to train on; None are all of this machine.
    """
    devices = len(gpus.names() if on is None else on) or max(1, min(cores(), batch_size // _LEAST))
    devices = min(devices, most or devices)
    ranks = next(count for count in range(devices, 0, -1) if batch_size % count == 0)
    share = batch_size // ranks
    accumulation = next(
        count for count in range(1, share + 1) if share % count == 0 and share // count <= micro_batch_size
    )
    return ranks, share // accumulation, accumulation


def readers() -> dict[str, Any]:
    """DataLoader's settings of the processes that prepare this rank's rows: none without a GPU, where all cores train.

    Four keep up with an H200 several times over (benchmarks/sft_data.py). They are forked and so begin at once. A rank
    has been spawned, and so would they be, each importing torch anew, one after another. They compute on no GPU.
    """
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    count = min(4, max(1, share - 1)) if gpus.names() else 0
    return {"num_workers": count, "multiprocessing_context": "fork" if count else None}


def launch(
    work: Callable[..., None],
    ranks: int,
    *args,
    group: bool = False,
    relief: str = "",
    on: Sequence[str] | None = None,
) -> None:
    """Run work(*args) once in each rank, in this process if there is just one.

    torch, accelerate and TRL find their rank in the environment, as torchrun would set it. The first rank that fails
    ends the others, and this process with the same exit code or its error. No rank outlives this process.

    Without a GPU each computes on one thread: two in one process do not always repeat the same bytes (LOG.md).

    group: make a process group of one rank too, as DeepSpeed wants. relief: what to say would help when memory is full.
    on: the GPUs to train on, None are all. A process that has begun CUDA sees the GPUs that it saw then, whatever the
    environment says later: so with GPUs of its own, one rank too is a process of its own.
    """
    if on is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(on)  # which the ranks inherit
    if ranks == 1 and not group and on is None:
        _set_threads(ranks)
        _work(work, relief, args)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.start_processes(
        _rank, (work, ranks, port, relief, args), ranks, join=False, start_method="spawn"
    )
    try:
        while not context.join():
            pass
    except multiprocessing.ProcessExitedException as error:
        if error.exit_code > 0:
            sys.exit(error.exit_code)  # it has said why
        name = signal.Signals(-error.exit_code).name
        message = f"rank {error.error_index} was ended by {name}"
        if name == "SIGKILL":
            message += f"; that may mean that the machine's memory was full. {relief}"
        raise WorkError(message.rstrip(". ")) from None
    finally:
        for process in context.processes:
            process.kill()


def wait() -> None:
    """Wait until every rank is here. To be called in all ranks, or in none.

    The ranks wait on the processor, for up to a day: some have longer to play than others, and NCCL's barriers would
    keep a GPU busy that a server plays on meanwhile.
    """
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.barrier(_on_the_processor())


@cache
def _on_the_processor() -> distributed.ProcessGroup:
    return distributed.new_group(backend="gloo", timeout=timedelta(days=1))


def _rank(rank: int, work: Callable[..., None], ranks: int, port: int, relief: str, args: tuple) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    quiet()
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    if gpus.used():
        torch.cuda.set_device(rank)
    _set_threads(ranks)
    try:
        _work(work, relief, args)
    except (ConfigError, WorkError) as error:
        fail(error)


def _set_threads(ranks: int) -> None:
    torch.set_num_threads(max(1, cores() // ranks) if gpus.used() else 1)


def _work(work: Callable[..., None], relief: str, args: tuple) -> None:
    """work(*args); a full memory becomes a WorkError that says what would help."""
    try:
        work(*args)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on the CPU it's this and no other
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        where = f"rank {os.environ['RANK']}'s memory" if "RANK" in os.environ else "memory"
        raise WorkError(f"{where} is full ({str(error).splitlines()[0]}). {relief}".rstrip()) from None
