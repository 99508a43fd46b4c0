"""Reading ahead and writing behind: while one layer is encoded, the next is read and the previous one written.

Reading and writing release Python's lock, so that each has a core while the other works. Order is kept, one layer is
read ahead and at most ``DEPTH`` wait to be written: memory stays that of a few layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from formats.container import ModelWriter

__all__ = ["WriteBehind", "read_ahead"]

DEPTH = 2
T = TypeVar("T")


def read_ahead(names: Sequence[str], read: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """Each name with what ``read`` gives for it; the next one is being read meanwhile. Errors come in their turn."""
    with ThreadPoolExecutor(1, "eqat-read") as thread:
        waiting = thread.submit(read, names[0]) if names else None
        for i, name in enumerate(names):
            assert waiting is not None
            found = waiting.result()
            waiting = thread.submit(read, names[i + 1]) if i + 1 < len(names) else None
            yield name, found


class WriteBehind:
    """Hands tensors to a writer from a thread of its own, in order; a context manager inside the writer's.

    What the writer raises is raised by a later call, ``drain`` at the latest.
    """

    def __init__(self, writer: ModelWriter) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, "eqat-write")
        self._waiting: deque[Future[None]] = deque()

    def add_layer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """See ModelWriter."""
        self._submit(self._thread.submit(self._writer.add_layer, name, tensors))

    def add(self, name: str, tensor: Tensor) -> None:
        """See ModelWriter."""
        self._submit(self._thread.submit(self._writer.add, name, tensor))

    def drain(self) -> None:
        """Returns when everything is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, job: Future[None]) -> None:
        self._waiting.append(job)
        while len(self._waiting) > DEPTH:
            self._waiting.popleft().result()
