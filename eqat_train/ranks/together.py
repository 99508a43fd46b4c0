"""How a run of several ranks begins and ends: one message for what went wrong, by whichever rank, and no rank left.

A rank that fails leaves its reason in the store and ends; torchrun then ends the others. Rank 0 says what went wrong
when it can; a rank whose reason rank 0 does not have itself says it too, with its number. A rank that waits inside
NCCL for one that is gone cannot act on a signal, so a thread ends it when a signal has come and a rank is gone, or half
a minute has passed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import torch
import torch.distributed as dist

from formats.errors import EqatError

from .group import Ranks, join, leave
from .orders import OtherRankFailed, failures, give_order, note_failure

__all__ = ["RankLostError", "run_together"]

# Seconds that a signal may take to end a rank, and that a rank waits to see whether others tell the same story.
GRACE, HEARSAY = 25.0, 1.0
FAILED = 2
KEPT = "what is finished is kept: the same command goes on from it"


class RankLostError(EqatError):
    """Another rank has ended."""


def run_together(device: str, lead: Callable[[], None], follow: Callable[[], None]) -> None:
    """Runs ``lead`` on rank 0, or in a process alone, and ``follow`` on every other rank.

    Args:
        device: auto, cpu or cuda.
        lead: the whole run.
        follow: takes part in it until the order ``end`` comes.

    Raises:
        EqatError: on rank 0, whatever a rank refused.
        SystemExit: on the others when anything fails.
    """
    ranks = join(device)
    if ranks is None:
        lead()
        return
    with _ended_by_signals(ranks):
        if ranks.rank:
            _follow(ranks, follow)
        else:
            _lead(lead)
    leave()


def _lead(lead: Callable[[], None]) -> None:
    try:
        lead()
    except BaseException as error:
        if (lost := _lost(error)) is not None:
            _note(lost)
            raise lost from error
        _note(error)
        raise
    give_order("end")


def _follow(ranks: Ranks, follow: Callable[[], None]) -> None:
    try:
        follow()
    except (KeyboardInterrupt, SystemExit):
        raise SystemExit(128 + signal.SIGINT) from None  # rank 0 says so
    except BaseException as error:
        if _lost(error) is None:
            text = _note(error)
            time.sleep(HEARSAY)
            if not any(text in told for told in failures().values()):
                if not isinstance(error, EqatError):
                    raise
                print(f"error: rank {ranks.rank}: {' '.join(text.split())}", file=sys.stderr, flush=True)
        raise SystemExit(FAILED) from error


def _note(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    with suppress(RuntimeError):  # torchrun may be gone, and its store
        note_failure(text)
    return text


def _lost(error: BaseException) -> RankLostError | None:
    """The error for a rank that stopped because another did; None when the reason is its own."""
    if isinstance(error, OtherRankFailed):
        return RankLostError(f"{error}; {KEPT}")
    # gloo raises plain RuntimeError
    unexpected = isinstance(error, RuntimeError) and not isinstance(error, EqatError | torch.OutOfMemoryError)
    if not unexpected or not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
        return None
    told: dict[int, str] = {}
    try:
        deadline = time.monotonic() + HEARSAY
        while not told and time.monotonic() < deadline:
            time.sleep(HEARSAY / 10)
            with suppress(RuntimeError):
                told = failures()
    except SystemExit:  # torchrun ends the ranks that are left
        pass
    except KeyboardInterrupt:  # which ended the other rank too
        return RankLostError(f"interrupted; {KEPT}")
    if told:
        number, text = next(iter(told.items()))
        return RankLostError(f"rank {number}: {text}; {KEPT}")
    return RankLostError(f"another rank has ended without a word, torchrun says which; {KEPT}")


@contextmanager
def _ended_by_signals(ranks: Ranks) -> Iterator[None]:
    """Inside, a signal that the main thread does not act upon in time ends the process all the same."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    ended = threading.Event()

    def watch() -> None:
        number = os.read(reading, 1)
        os.close(reading)
        if not number:
            return
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and not _another_is_gone(ranks):
            if ended.wait(HEARSAY):
                return
        if ended.wait(HEARSAY):
            return
        if not ranks.rank:
            print(f"error: stopped while it waited for another rank; {KEPT}", file=sys.stderr, flush=True)
        os._exit(128 + number[0])

    ranks.store.set(f"process/{ranks.rank}", f"{socket.gethostname()} {os.getpid()}")
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        _abort(ranks)
        raise
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join(GRACE)


def _another_is_gone(ranks: Ranks) -> bool:
    """Whether a rank has failed, or has no process any more; of other machines only the first is known."""
    with suppress(RuntimeError):  # torchrun may be gone, and its store
        for number in range(ranks.size):
            if ranks.store.check([f"process/{number}"]):
                host, process = ranks.store.get(f"process/{number}").decode().split()
                if host == socket.gethostname() and not _runs(int(process)):
                    return True
        return bool(failures())
    return True


def _runs(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _abort(ranks: Ranks) -> None:
    """Ends what NCCL has under way: it would wait for a rank that is gone, and this process could not end."""
    if ranks.backend == "nccl" and dist.group.WORLD is not None:
        with suppress(RuntimeError):
            dist.group.WORLD.abort()
