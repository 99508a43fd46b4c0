"""Dequantization on a GPU: the launcher of the kernel (:mod:`.kernel`), and what it refuses."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..packed import PackedWeight
from .kernel import dequant_kernel

__all__ = ["dequant", "dequant_into", "refusal"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BITS = (2, 3, 4, 8)
BLOCK_N, BLOCK_K, WARPS = 128, 64, 4
RUN = 8  # neighbouring input features that a thread unpacks: 16 bytes of a 16-bit weight


def refusal(packed: PackedWeight, scales: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the kernel cannot compute these, or None."""
    if packed.bits not in BITS:
        return f"the kernel has 2, 3, 4 and 8 bits, not {packed.bits}"
    if scales.dtype not in DTYPES or dtype not in DTYPES:
        return f"the kernel has float16, bfloat16 and float32, not scales in {scales.dtype} and weights in {dtype}"
    return None


def dequant(packed: PackedWeight, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`eqat_train.ops.dequant.dequant`; scales stored in 16 bits are widened to float32, which is exact."""
    weight = torch.empty(packed.out_features, packed.in_features, dtype=dtype, device=packed.qweight.device)
    dequant_into(weight, packed, scales, 0)
    return weight


def dequant_into(weight: Tensor, packed: PackedWeight, scales: Tensor, first: int) -> None:
    """Writes rows ``first`` and up of the weight to ``weight`` ``[rows, in]``, contiguous."""
    qweight, qzeros, scales = packed.qweight.contiguous(), packed.qzeros.contiguous(), scales.detach().contiguous()
    rows, columns = weight.shape
    width = columns if packed.group_size == -1 else packed.group_size
    grid = (triton.cdiv(columns, BLOCK_K), triton.cdiv(rows, BLOCK_N))
    dequant_kernel[grid](
        qweight,
        qzeros,
        scales,
        packed.g_idx,
        weight,
        first,
        rows,
        columns,
        packed.out_features,
        qzeros.shape[1],
        width,
        BITS=packed.bits,
        GROUPING=_grouping(packed, width),
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        RUN=RUN,
        num_warps=WARPS,
    )


def _grouping(packed: PackedWeight, width: int) -> str:
    """For what the kernel reads a scale: a tile, a run of input features, or each of them."""
    if packed.g_idx is not None:
        return "index"
    if width % BLOCK_K == 0 or width >= packed.in_features:
        return "tile"
    return "run" if width % RUN == 0 else "each"
