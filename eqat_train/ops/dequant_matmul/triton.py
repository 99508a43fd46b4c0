"""Packed linear on a GPU without gradients: which kernel for how many rows of x.

Up to :data:`~.decode.MAX_ROWS` rows, one kernel that reads the packed words (:mod:`.decode`); above, or where those
kernels refuse, slices of the weight are dequantized and multiplied by cuBLAS (:mod:`.prefill`). Both are deterministic:
nothing is added in an order that time decides. Gradients are :mod:`.autograd`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dequant.triton import refusal as dequant_refusal
from ..packed import PackedWeight
from .decode import MAX_ROWS, decode_matmul, decode_refusal
from .prefill import prefill_matmul

__all__ = ["dequant_matmul", "refusal", "warm_up"]


def refusal(x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None = None) -> str | None:
    """Why the kernels cannot compute these, or None."""
    if bias is not None and bias.dtype != x.dtype:
        return f"the bias is {bias.dtype} and x is {x.dtype}"
    return dequant_refusal(packed, scales, x.dtype)


def dequant_matmul(x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`eqat_train.ops.dequant_matmul.dequant_matmul`; scales may also be stored in 16 bits."""
    rows = x.detach().reshape(-1, packed.in_features)
    multiply = decode_matmul if decode_refusal(rows, packed, scales) is None else prefill_matmul
    return multiply(rows, packed, scales, bias).view(*x.shape[:-1], packed.out_features)


def warm_up(packed: PackedWeight, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Compiles every kernel that a layer may need, so that none is compiled inside a CUDA graph's capture.

    Which kernel runs depends on the rows of ``x`` alone; nothing is tuned at run time.
    """
    for rows in (1, MAX_ROWS // 2, MAX_ROWS, MAX_ROWS + 1):
        dequant_matmul(scales.new_zeros(rows, packed.in_features, dtype=dtype), packed, scales, bias)
