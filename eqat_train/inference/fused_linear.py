"""Linears that read the same input as one: their weights are concatenated along out, which is exact.

One launch reads what two or three would, and small linears fill the device better together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from formats.packing import pack_bits, unpack_bits

from ..ops.packed import PackedWeight
from .packed_linear import PackedLinear

__all__ = ["fuse_linears"]


class SideBySide(nn.Module):
    """Linears that cannot be one, e.g. of different bits: their outputs are concatenated."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., sum of out]``."""
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


def fuse_linears(linears: Sequence[nn.Module]) -> nn.Module:
    """One module that computes ``cat([linear(x) for linear in linears], -1)``.

    Args:
        linears: ``nn.Linear`` or PackedLinear, of one ``in_features``.
    """
    if all(type(linear) is nn.Linear for linear in linears):
        return _fuse_dense([linear for linear in linears if isinstance(linear, nn.Linear)])
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    if len(packed) == len(linears) and len({_kind(linear) for linear in packed}) == 1 and not packed[0].act_order:
        return _fuse_packed(packed)
    return SideBySide(linears)


def _kind(linear: PackedLinear) -> tuple[object, ...]:
    return linear.bits, linear.group_size, linear.scales.dtype, linear.act_order, linear.impl, linear.bias is None


def _fuse_dense(linears: Sequence[nn.Linear]) -> nn.Linear:
    first = linears[0]
    with torch.device("meta"):
        fused = nn.Linear(first.in_features, sum(linear.out_features for linear in linears), bias=False)
    fused.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    bias = _cat_biases([linear.bias for linear in linears], [linear.out_features for linear in linears], first.weight)
    if bias is not None:
        fused.bias = nn.Parameter(bias, requires_grad=False)
    return fused


def _fuse_packed(linears: Sequence[PackedLinear]) -> PackedLinear:
    first = linears[0]
    per_word = 32 // first.bits
    # zero-points are packed along out, so words of two layers may have to share one
    zeros = [unpack_bits(item.qzeros, item.bits, item.out_features, axis=1, per_word=per_word) for item in linears]
    packed = PackedWeight(
        torch.cat([linear.qweight for linear in linears], dim=1),
        pack_bits(torch.cat(zeros, dim=1), first.bits, axis=1, per_word=per_word),
        first.bits,
        first.group_size,
        first.in_features,
    )
    scales = torch.cat([linear.scales for linear in linears], dim=1)
    bias = None if first.bias is None else torch.cat([linear.bias for linear in linears if linear.bias is not None])
    return PackedLinear(packed, scales, bias, impl=first.impl)


def _cat_biases(biases: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat([like.new_zeros(n) if bias is None else bias for bias, n in zip(biases, sizes, strict=True)])
