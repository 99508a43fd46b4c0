"""Residual addition and RMS normalization in one: ``s = x + delta``, ``y = weight * (s / rms(s))``."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import run

__all__ = ["add_rms_norm"]


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The sum, rounded to the dtype, and its normalization: ``rms(s) = sqrt(mean(s**2) + epsilon)`` in float32.

    The quotient is rounded to the dtype before the weight is applied, as Llama does. Differentiable in ``x`` and
    ``delta``.

    Args:
        x: floating ``[..., features]``.
        delta: as ``x``, or None for no addition.
        weight: ``[features]`` in the dtype of ``x``, without a gradient.
        epsilon: under the root.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        ``s`` and ``y``, each in the shape and dtype of ``x``; ``s`` is ``x`` itself without a delta.
    """
    return run("add_rms_norm", impl, x.device, x, delta, weight, epsilon)
