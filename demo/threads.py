"""How many CPU threads torch should use: measured, because on a shared machine fewer are often faster."""

import os
import time
from collections.abc import Callable

import torch

MOST_THREADS = 16  # a model this small gains nothing from more
REPEATS = 3


def set_fastest_threads(work: Callable[[], object]) -> dict[int, float]:
    """Set the number of threads with which `work` runs fastest; return the seconds of each number tried.

    The best of the repeats counts: the slower ones show what else the machine was doing.
    """
    seconds = {}
    for threads in _candidates():
        torch.set_num_threads(threads)
        work()  # starts the threads
        seconds[threads] = min(_timed(work) for _ in range(REPEATS))
    torch.set_num_threads(min(seconds, key=seconds.__getitem__))
    return seconds


def _candidates() -> list[int]:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [2**power for power in range(5) if 2**power <= min(available, MOST_THREADS)]


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
