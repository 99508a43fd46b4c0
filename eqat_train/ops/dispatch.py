"""Chooses who computes an op: the plain-torch reference, or a Triton kernel with the same signature.

An op ``name`` lives in ``ops/name/``. Its ``reference.py`` and its ``triton.py`` each define a function called
``name``; ``triton.py`` also defines ``refusal``, which takes the same arguments and says why the kernel cannot compute
them, or None. The op's public call takes ``impl="auto" | "reference" | "triton"`` and returns ``run("name", ...)``.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch

from formats.errors import InputError

__all__ = ["IMPLEMENTATIONS", "run"]

IMPLEMENTATIONS = ("auto", "reference", "triton")


def run(op: str, impl: str, device: torch.device, *arguments: Any) -> Any:
    """The result of ``op`` on ``device``.

    Args:
        op: the op's folder name under ``eqat_train.ops``.
        impl: ``"auto"`` takes the kernel on CUDA where it holds the arguments, else the reference; an implementation
            that is named is taken or refused, never replaced.
        device: where the op's tensors are.
        arguments: the op's.

    Raises:
        InputError: the implementation is unknown or cannot compute this.
    """
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"impl is {impl!r}; allowed are {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton" or (impl == "auto" and device.type == "cuda"):
        why = _no_triton(op, device)
        if why is None:
            kernel = _module(op, "triton")
            why = kernel.refusal(*arguments)
            if why is None:
                return getattr(kernel, op)(*arguments)
        if impl == "triton":
            raise InputError(f"{op}: {why}; use impl='reference' or impl='auto'")
    return getattr(_module(op, "reference"), op)(*arguments)


@cache
def _module(op: str, implementation: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{op}.{implementation}")


@cache
def _no_triton(op: str, device: torch.device) -> str | None:
    """Why no Triton kernel of ``op`` runs on a device, or None."""
    if importlib.util.find_spec(f"{__package__}.{op}.triton") is None:
        return "has no triton kernel"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton  # noqa: PLC0415

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton kernels need a CUDA device and this is {device.type} (TRITON_INTERPRET=1 interprets them)"
    return None
