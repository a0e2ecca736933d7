"""Threads for work that consists of many small operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

MOST = 8  # more threads wait for Python's lock


def one_thread_each(work: Callable, parts: Sequence) -> list:
    """[work(part) for part in parts] on the CPU, as many parts at a time as torch has threads, each on one thread.

    torch's own way, to spread every operation over all threads, makes each operation wait for the slowest thread. Where
    another program uses one of the cores, that is many times the time of the operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, MOST), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)
