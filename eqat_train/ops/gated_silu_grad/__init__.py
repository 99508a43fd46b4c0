"""Gradients of ``y = silu(gate) * up``, one of them in place of the incoming one."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import run

__all__ = ["gated_silu_grad_"]


def gated_silu_grad_(gate: Tensor, up: Tensor, grad: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``gate`` and ``up``.

    Args:
        gate: floating, any shape, contiguous.
        up: of the shape and dtype of ``gate``, contiguous.
        grad: that of ``y``, of the same shape and dtype, contiguous; overwritten by the gradient of ``up``.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        The gradient of ``gate``, and ``grad``, now that of ``up``.
    """
    grads: tuple[Tensor, Tensor] = run("gated_silu_grad", impl, gate.device, gate, up, grad)
    return grads
