"""Packed linear layer in plain torch: dequantize, ``F.linear``, forget; again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..dequant.reference import apply_scales, centered_codes, dequant
from ..packed import PackedWeight
from ..scale_grad.reference import reduce_groups

__all__ = ["dequant_matmul"]


def dequant_matmul(x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`eqat_train.ops.dequant_matmul.dequant_matmul`."""
    return _DequantMatmul.apply(x, packed, scales, bias)


class _DequantMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.packed = packed
        return F.linear(x, dequant(packed, scales, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, scales = ctx.saved_tensors
        packed: PackedWeight = ctx.packed
        needs_x, _, needs_scales, needs_bias = ctx.needs_input_grad
        grad_x = grad_scales = grad_bias = None
        if needs_x or needs_scales:
            centered = centered_codes(packed)
        if needs_x:
            grad_x = grad_output @ apply_scales(packed, centered, scales, x.dtype)
        if needs_scales:
            grad_scales = reduce_groups(packed, centered, x, grad_output).to(scales.dtype)
        if needs_bias:
            grad_bias = grad_output.reshape(-1, packed.out_features).sum(dim=0)
        return grad_x, None, grad_scales, grad_bias
