"""Packed linear for many rows of x: slices of the weight are dequantized and multiplied by cuBLAS.

With enough rows, the next slice is dequantized on a second stream while this one is multiplied: one kernel wants the
memory, the other the tensor cores. Slices are written to two buffers in turn, whoever runs first, so results do not
depend on timing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dequant.triton import dequant_into
from ..packed import PackedWeight

__all__ = ["prefill_matmul"]

SLICE = 2048  # output features; measured on an H200 (docs/results.md), like the next
OVERLAP_FROM = 1024  # rows of x
BUFFERS = 2


def prefill_matmul(x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` ``[rows, in]`` times the dequantized weight, plus ``bias``: ``[rows, out]`` in the dtype of ``x``."""
    if x.device.type == "cuda" and x.shape[0] >= OVERLAP_FROM and packed.out_features > SLICE:
        return _overlapped(x, packed, scales, bias, SLICE)
    weight = x.new_empty(packed.out_features, packed.in_features)
    dequant_into(weight, packed, scales, 0)
    return F.linear(x, weight, bias)


def _overlapped(x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, size: int) -> Tensor:
    main, side = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
    y = x.new_empty(x.shape[0], packed.out_features)
    buffers = [x.new_empty(size, packed.in_features) for _ in range(BUFFERS)]
    read: list[torch.cuda.Event] = []
    side.wait_stream(main)
    for index, start in enumerate(range(0, packed.out_features, size)):
        out = y[:, start : start + size]
        weight = buffers[index % BUFFERS][: out.shape[1]]
        if index >= BUFFERS:
            side.wait_event(read[index - BUFFERS])
        with torch.cuda.stream(side):
            dequant_into(weight, packed, scales, start)
        main.wait_event(side.record_event())
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias[start : start + size], x, weight.t(), out=out)
        read.append(main.record_event())
    return y
