"""Jobs that run beside one another: their order, their memory, and what stops them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from eqat_export.workers import Job, in_order


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


pytestmark = pytest.mark.usefixtures("two_threads")


def test_results_keep_the_order_of_their_jobs() -> None:
    jobs = [Job(lambda i=i: (time.sleep(0.01 * (i % 3 == 0)), i)[1], 1) for i in range(20)]
    assert list(in_order(jobs)) == list(range(20))
    assert list(in_order([])) == []


def test_two_jobs_run_at_a_time_where_torch_may_use_two_threads() -> None:
    both = threading.Barrier(2, timeout=20)  # passed only by two at once
    assert sorted(in_order([Job(both.wait, 1), Job(both.wait, 1)])) == [0, 1]


def test_each_job_has_one_torch_thread_and_the_callers_setting_comes_back() -> None:
    assert list(in_order([Job(torch.get_num_threads, 1)] * 4)) == [1] * 4
    assert torch.get_num_threads() == 2
    late: list[int] = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [2]


def most_at_once(memory: int, limit: int) -> int:
    """How many jobs of so much memory were under way or waiting to be taken at most."""
    started, taken, most = 0, 0, 0
    lock = threading.Lock()

    def run() -> None:
        nonlocal started, most
        with lock:
            started += 1
            most = max(most, started - taken)

    with closing(in_order([Job(run, memory) for _ in range(12)], limit)) as results:
        for _ in results:
            time.sleep(0.02)
            with lock:
                taken += 1
    assert started == 12
    return most


@pytest.mark.parametrize(("memory", "expected"), [(1, 4), (40, 2), (60, 1), (1000, 1)])
def test_no_more_is_under_way_than_the_budget_allows_but_always_one(memory: int, expected: int) -> None:
    assert 1 <= most_at_once(memory, 100) <= expected


def test_what_a_job_raises_comes_in_its_turn_and_ends_it() -> None:
    begun = []

    def fail() -> int:
        raise ValueError("third")

    def count(i: int) -> int:
        begun.append(i)
        return i

    jobs = [Job(lambda: count(0), 1), Job(lambda: count(1), 1), Job(fail, 1), *(Job(lambda: count(9), 1),) * 50]
    found = []
    with pytest.raises(ValueError, match="third"), closing(in_order(jobs)) as results:
        for result in results:
            found.append(result)
    assert found == [0, 1]
    assert len(begun) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("eqat-encode")]


def test_closing_early_begins_nothing_further_and_leaves_no_thread() -> None:
    begun = []
    with closing(in_order([Job(lambda: begun.append(1), 1)] * 100)) as results:
        next(results)
    assert len(begun) < 10
    assert torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("eqat-encode")]
