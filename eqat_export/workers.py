"""Jobs done several at a time, their results taken in order.

torch uses several cores for one large operation, but encoding a layer is hundreds of small ones, most of them bound by
memory. A layer a core does better. torch releases Python's lock inside its operations, so threads suffice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

__all__ = ["MEMORY", "Job", "in_order"]

# Bytes that jobs may take together, their results included until these are taken: by the estimate of ``layer_memory``
# three of a 70B model's largest layers, so that one is written while others are encoded.
MEMORY = 1344 * 2**20
MOST_WORKERS = 8
T = TypeVar("T")


@dataclass(frozen=True)
class Job(Generic[T]):
    """Something to compute.

    Attributes:
        run: computes it, in any thread.
        memory: bytes it takes while it runs and until its result is dropped, about.
    """

    run: Callable[[], T]
    memory: int


def in_order(jobs: Iterable[Job[T]], memory: int = MEMORY) -> Generator[T, None, None]:
    """Results of the jobs in their order.

    There are as many workers as torch may use threads here (``OMP_NUM_THREADS``), at most eight, and each of them lets
    torch use one. Ahead of the result that is being taken, at most one job more than workers is under way, fewer where
    they would take more than ``memory`` together, but always one.

    To be closed (``contextlib.closing``): what has not begun is then dropped, what runs is waited for.

    Raises:
        BaseException: what a job raises, when its turn comes; nothing further is begun.
    """
    threads = torch.get_num_threads()
    workers = min(threads, MOST_WORKERS)
    waiting: deque[tuple[int, Future[T]]] = deque()
    source = iter(jobs)
    following = next(source, None)
    held = 0
    pool = ThreadPoolExecutor(workers, "eqat-encode", initializer=torch.set_num_threads, initargs=(1,))
    try:
        while waiting or following is not None:
            while following is not None and len(waiting) <= workers and (not held or held + following.memory <= memory):
                waiting.append((following.memory, pool.submit(following.run)))
                held += following.memory
                following = next(source, None)
            size, future = waiting.popleft()
            result = future.result()
            del future
            yield result
            del result
            held -= size
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' setting is one for threads to come as well
