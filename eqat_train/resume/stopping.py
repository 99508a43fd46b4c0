"""An interruption that waits for the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopAfterStep"]


class StopAfterStep:
    """Inside, the first Ctrl-C (or SIGTERM) is noted and takes effect at ``check``; the second one at once.

    A context manager. Outside the main thread, where signals cannot be handled, it does nothing.

    Attributes:
        requested: a signal has come.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._received: int | None = None

    @property
    def requested(self) -> bool:
        return self._received is not None

    def __enter__(self) -> StopAfterStep:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if callable(signal.getsignal(number)):  # one that is ignored stays ignored
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, together: bool | None = None) -> None:
        """Does what the noted signal would have done, if there is one.

        Args:
            together: whether the ranks have agreed to stop now; None for a process alone, which stops by itself.
        """
        if together:
            self._received = self._received or signal.SIGINT
        if self._received is not None and together is not False:
            self._before[self._received](self._received, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            self._before[number](number, frame)
        self._received = number
