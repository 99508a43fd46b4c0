"""Weight of a packed linear: ``w = (q - z) * s``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import run
from ..packed import PackedWeight

__all__ = ["dequant"]


def dequant(packed: PackedWeight, scales: Tensor, dtype: torch.dtype = torch.float32, *, impl: str = "auto") -> Tensor:
    """Dequantized weight: the difference is an exact integer, the product is float32 (float64 for such scales).

    Args:
        packed: codes and zero-points.
        scales: floating ``[groups, out]``.
        dtype: the product is rounded to it once.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        ``dtype`` ``[out, in]``, contiguous.
    """
    return run("dequant", impl, scales.device, packed, scales, dtype)
