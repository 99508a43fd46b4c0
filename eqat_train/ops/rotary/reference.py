"""The embedding in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary"]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`eqat_train.ops.rotary.rotary`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(2)
