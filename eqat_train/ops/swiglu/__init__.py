"""The gated activation of Llama's feed-forward layer: ``silu(gate) * up``. For inference."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import run

__all__ = ["swiglu"]


def swiglu(gate_up: Tensor, *, impl: str = "auto") -> Tensor:
    """``silu(gate) * up`` of the two halves of a row.

    Args:
        gate_up: floating ``[rows, 2 * features]``: all gates, then all ups.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        ``[rows, features]`` in the dtype of ``gate_up``.
    """
    return run("swiglu", impl, gate_up.device, gate_up)
