"""The norm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`eqat_train.ops.rms_norm.rms_norm`."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return weight * values.to(x.dtype)
