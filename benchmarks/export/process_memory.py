"""Memory of a process and everything it started, watched from outside."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

__all__ = ["TreeMemory"]

_PROC = Path("/proc")


class TreeMemory:
    """Peak memory of a process and its descendants while the block runs; Linux.

    Attributes:
        pss: bytes, pages that several processes share counted once in all.
        rss: bytes, such pages counted for every process.
        processes: most at a time.

    Args:
        pid: the process.
        interval: seconds between two looks; what comes and goes in between is missed.
    """

    def __init__(self, pid: int, interval: float = 0.25) -> None:
        self.pss = self.rss = self.processes = 0
        self._pid, self._interval = pid, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> TreeMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            found = [sizes for pid in _tree(self._pid) if (sizes := _sizes(pid)) is not None]
            self.pss = max(self.pss, sum(pss for pss, _ in found))
            self.rss = max(self.rss, sum(rss for _, rss in found))
            self.processes = max(self.processes, len(found))


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for each in found:
        for task in (_PROC / str(each) / "task").glob("*/children"):
            with suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def _sizes(pid: int) -> tuple[int, int] | None:
    """PSS and RSS in bytes; None of a process that has ended."""
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    sizes = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines[1:])}
    return (sizes["Pss"], sizes["Rss"]) if "Pss" in sizes else None
