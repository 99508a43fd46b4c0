"""Gradient of a packed linear's scales: ``ds[g, n] = sum over k in g of (q - z)[n, k] * (dY^T X)[n, k]``."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import run
from ..packed import PackedWeight

__all__ = ["scale_grad"]


def scale_grad(x: Tensor, grad_output: Tensor, packed: PackedWeight, *, impl: str = "auto") -> Tensor:
    """Gradient with respect to the scales of ``y = x @ w.T``.

    Args:
        x: floating ``[..., in]``.
        grad_output: ``[..., out]`` in the dtype of ``x``.
        packed: codes and zero-points.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        ``[groups, out]``, float32, or float64 when ``x`` is. ``dY^T X`` is a matmul in the dtype of ``x``; what follows
        is float32 (float64).
    """
    return run("scale_grad", impl, x.device, x, grad_output, packed)
