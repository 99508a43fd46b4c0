"""Residual addition and RMS normalization in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_rms_norm"]


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See :func:`eqat_train.ops.add_rms_norm.add_rms_norm`."""
    total = x if delta is None else x + delta
    wide = total if total.dtype == torch.float64 else total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return total, weight * normed.to(x.dtype)
