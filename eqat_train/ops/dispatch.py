"""Chooses who computes an op: the plain-torch reference, or a kernel with the same signature.

An op ``name`` lives in ``ops/name/``; its ``reference.py`` defines a function called ``name``. The op's public call
takes ``impl="auto" | "reference" | "triton"`` and runs ``select(impl, tensor.device, "name")(...)``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from formats.errors import InputError

__all__ = ["IMPLEMENTATIONS", "select"]

IMPLEMENTATIONS = ("auto", "reference", "triton")


@cache
def select(impl: str, device: torch.device, op: str) -> Callable[..., Any]:
    """The function that computes ``op`` on ``device``.

    Args:
        impl: ``"auto"`` takes the fastest that runs there; a name that is given is taken or refused, never replaced.
        device: where the op's tensors are.
        op: the op's folder name under ``eqat_train.ops``.

    Raises:
        InputError: the implementation is unknown or cannot run on this device.
    """
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"impl is {impl!r}; allowed are {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton":
        raise InputError(f"{op} has no triton kernel for {device.type} yet; use impl='reference' or impl='auto'")
    return getattr(importlib.import_module(f"{__package__}.{op}.reference"), op)
