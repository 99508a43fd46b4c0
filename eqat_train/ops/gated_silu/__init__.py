"""Gated activation: ``y = silu(gate) * up``."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import run

__all__ = ["gated_silu"]


def gated_silu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """Differentiable in both.

    Args:
        gate: floating, any shape.
        up: of the shape and dtype of ``gate``.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        In the shape and dtype of ``gate``.
    """
    y: Tensor = run("gated_silu", impl, gate.device, gate, up)
    return y
