"""Autograd of a packed linear layer around its kernels: dequantize, a dense matmul, forget; again in backward.

The graph has two nodes where one would do. The first keeps what backward needs before the product is computed, so that
checkpointing, which stops recomputing as soon as everything kept is there again, never repeats a layer's last product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..dequant import dequant
from ..packed import PackedWeight
from ..scale_grad import scale_grad

__all__ = ["trained_linear"]


def trained_linear(x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    """See :func:`eqat_train.ops.dequant_matmul.dequant_matmul`; ``impl`` is that of ``dequant`` and ``scale_grad``."""
    handle = _Kept.apply(x, packed, scales, bias, impl)
    return _Product.apply(handle, x.detach(), packed, scales.detach(), None if bias is None else bias.detach(), impl)


class _Kept(torch.autograd.Function):
    """Keeps the operands; its output has the shape of the product and no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, impl: str) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.packed, ctx.impl = packed, impl
        return x.new_empty(()).expand(*x.shape[:-1], packed.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, scales = ctx.saved_tensors
        packed: PackedWeight = ctx.packed
        needs_x, _, needs_scales, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_scales = grad_bias = None
        if needs_scales:
            grad_scales = scale_grad(x, grad_output, packed, impl=ctx.impl).to(scales.dtype)
        if needs_x:
            grad_x = grad_output @ dequant(packed, scales, x.dtype, impl=ctx.impl)
        if needs_bias:
            grad_bias = grad_output.reshape(-1, packed.out_features).sum(dim=0)
        return grad_x, None, grad_scales, grad_bias, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, impl: str
    ) -> Tensor:
        return F.linear(x, dequant(packed, scales, x.dtype, impl=impl), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output, None, None, None, None, None
