"""Worker processes of one machine: started with a fresh interpreter each, and ended whatever happens.

Not forked: a fork of a process with threads, and torch has threads, may wait forever for a lock that one of them held.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Pipe
from types import TracebackType
from typing import Any

from eqat_export.parallel.channel import Channel
from formats.errors import CheckpointError

__all__ = ["Processes"]

_CODE = "from eqat_export.parallel.worker import main; main()"


class Processes:
    """Workers with a channel to each; a context manager that ends them.

    Attributes:
        channels: see ``Team``.

    Args:
        count: how many.
        settings: what they open (``worker.py``).
    """

    def __init__(self, count: int, settings: dict[str, Any]) -> None:
        self.channels: list[Channel] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._count, self._settings = count, settings

    def loss(self, channel: Channel) -> Exception:
        """See ``Team``."""
        child = self._children[self.channels.index(channel)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)
        code = child.returncode
        how = "was killed, perhaps for want of memory" if code == -signal.SIGKILL else f"ended with {code}"
        return CheckpointError(f"{channel.name} {how}; nothing was written; try again, or with --workers 1")

    def finish(self) -> None:
        """Returns when what was written needs its writers no more."""

    def __enter__(self) -> Processes:
        try:
            for i in range(self._count):
                self._start(f"worker {i + 1} of {self._count}")
            for channel in self.channels:
                channel.send({"open": self._settings})
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self, name: str) -> None:
        ours, theirs = Pipe()
        self.channels.append(Channel(ours, name))
        # Ctrl-C goes to every process of a terminal; ours ends the workers, which never see it
        with theirs, _put_off(), _blocked(signal.SIGINT):
            child = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
            self._children.append(child)

    def _end(self) -> None:
        """Kills what still runs: a worker holds nothing that it would have to put in order."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()
        for channel in self.channels:
            channel.close()


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """This thread does not get a signal meanwhile, nor does a process that it starts, ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _put_off() -> Iterator[None]:
    """Python handles Ctrl-C and SIGTERM afterwards: its exception could come before a child is in anybody's hands.

    Blocking them does not do: any thread may take them, and the exception comes in the main one all the same.
    """
    if threading.current_thread() is not threading.main_thread():  # no handler runs in it
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
