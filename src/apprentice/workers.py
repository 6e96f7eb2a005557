"""Work in several processes that never outlive their parent."""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

from apprentice.progress import quiet

T = TypeVar("T")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all calls, which run at once, in their order.

    When one raises, the others are cancelled, and its own error is raised: what it says is for the user, and a group of
    errors would hide it.
    """
    error: BaseException
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
        return [task.result() for task in tasks]
    except BaseExceptionGroup as errors:
        error = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    raise error


def in_processes(
    work: Callable[..., T], calls: Iterable[tuple], places: Sequence[str | None] | None = None
) -> Iterator[T]:
    """The results of work(*call), as they come, on all cores.

    places: how many processes there are at most, and for each its GPU, as CUDA_VISIBLE_DEVICES names it, or None: it
    sees what this process sees. When work raises, what has not begun is dropped and the error is raised here.
    """
    calls = list(calls)
    places = [None] * cores() if places is None else places
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for place in places:
        free.put(place)
    pool = ProcessPoolExecutor(min(len(places), len(calls)) or 1, context, _begin, (free,))
    try:
        for future in as_completed([pool.submit(work, *call) for call in calls]):
            yield future.result()
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        results: Any = pool._result_queue
        results._writer.close()  # or the rest of a result would be waited for, whose sender was killed
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(free: "SimpleQueue[str | None]") -> None:
    gpu = free.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before anything in this process begins CUDA
    quiet()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait until the parent of this process has ended, and end too; to be run in a thread."""
    # A worker waits on a pipe whose other end it holds itself, so it would never notice that its parent is gone.
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
