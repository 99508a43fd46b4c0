"""Small questions about tensors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dtype_name", "same_bits"]


def same_bits(first: Tensor, second: Tensor) -> bool:
    """True when two tensors have the same dtype, shape and bytes."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if not first.numel():
        return True
    return torch.equal(first.contiguous().flatten().view(torch.uint8), second.contiguous().flatten().view(torch.uint8))


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
