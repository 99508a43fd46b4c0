"""Whether kernels are launched before those ahead of them have ended (:mod:`.overlap`).

Such a kernel reads weights while the kernel before it may still run. That is right inside a decoding loop, where no
kernel writes a weight, and not in general: the kernel before might be an optimizer's. So the loop has to say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

__all__ = ["may_overlap", "overlapping_launches"]

_WANTED: ContextVar[bool] = ContextVar("overlapping launches", default=False)


@contextmanager
def overlapping_launches() -> Iterator[None]:
    """Launches inside may start before the kernels ahead of them have ended; nothing inside may write a weight."""
    token = _WANTED.set(True)
    try:
        yield
    finally:
        _WANTED.reset(token)


def may_overlap(device: torch.device) -> bool:
    """Whether kernels on a device are launched so."""
    return _WANTED.get() and _can_overlap(device)


@cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
