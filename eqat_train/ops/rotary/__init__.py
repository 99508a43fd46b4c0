"""Rotary position embedding of heads: ``y = x * cos + rotate_half(x) * sin``."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import run

__all__ = ["rotary"]


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto") -> Tensor:
    """Rotated heads, differentiable in ``x``; ``rotate_half`` is ``(a, b) -> (-b, a)`` on halves of a head.

    Args:
        x: floating ``[batch, tokens, heads, head_dim]``.
        cos: ``[1 or batch, tokens, head_dim]``.
        sin: of the shape of ``cos``.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        In the shape and dtype of ``x``.
    """
    y: Tensor = run("rotary", impl, x.device, x, cos, sin)
    return y
