"""Begins to put a file on disk while it is still being written."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import BinaryIO

__all__ = ["Writeback"]

_STEP = 32 * 2**20  # bytes at a time
_WRITE = 2  # SYNC_FILE_RANGE_WRITE of linux/fs.h: begin, and wait for nothing


class Writeback:
    """Tells Linux from time to time to write what a file has got so far; elsewhere it does nothing.

    Otherwise the system begins when fsync asks for everything at once, and the disk idles until then. What is durable
    is still only what fsync has returned for.
    """

    def __init__(self, file: BinaryIO | int) -> None:
        self._descriptor = file if isinstance(file, int) else file.fileno()
        self._begun = 0
        self._call: Callable[..., int] | None = None
        with contextlib.suppress(OSError, AttributeError, TypeError):
            self._call = ctypes.CDLL(None).sync_file_range

    def reached(self, position: int) -> None:
        """Everything before this byte has been handed to the system."""
        if position - self._begun < _STEP:
            return
        self.begin(self._begun, position - self._begun)
        self._begun = position

    def begin(self, offset: int, count: int) -> None:
        """So many bytes from this one on have been handed to the system."""
        if self._call is not None:
            self._call(self._descriptor, ctypes.c_int64(offset), ctypes.c_int64(count), ctypes.c_uint(_WRITE))
