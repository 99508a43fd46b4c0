"""Keeping other libraries' banners, logs and progress bars out of our output."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["library_output_hidden"]


@contextmanager
def library_output_hidden() -> Iterator[None]:
    """Sends file descriptors 1 and 2 to a scratch file while the block runs.

    Descriptors rather than ``sys.stdout``: libraries keep handles they opened at import, and extensions write directly.
    Exceptions pass through, so nothing that matters is lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as scratch:
        os.dup2(scratch.fileno(), 1)
        os.dup2(scratch.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip(saved, (1, 2), strict=True):
                os.dup2(descriptor, original)
                os.close(descriptor)
