"""Root-mean-square norm with a frozen weight: ``y = w * (x / sqrt(mean(x^2) + eps))``."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import run

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str = "auto") -> Tensor:
    """Norm over the last dimension, differentiable in ``x`` alone.

    The quotient is computed in float32 and rounded to the dtype of ``x`` before the weight is applied, as Llama does.

    Args:
        x: floating ``[..., features]``.
        weight: ``[features]`` in the dtype of ``x``, without a gradient.
        eps: added to the mean square.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        In the shape and dtype of ``x``.
    """
    y: Tensor = run("rms_norm", impl, x.device, x, weight, eps)
    return y
