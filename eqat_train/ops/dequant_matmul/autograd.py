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
from ..gated_silu import gated_silu
from ..gated_silu_grad import gated_silu_grad_
from ..packed import PackedWeight
from ..scale_grad import scale_grad

__all__ = ["trained_gated_linear", "trained_linear"]


def trained_linear(x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    """See :func:`eqat_train.ops.dequant_matmul.dequant_matmul`; ``impl`` is that of ``dequant`` and ``scale_grad``."""
    handle = _Kept.apply(x, packed, scales, bias, impl)
    return _Product.apply(handle, x.detach(), packed, scales.detach(), _detached(bias), impl)


def trained_gated_linear(
    gate: Tensor, up: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, impl: str
) -> Tensor:
    """The layer on ``silu(gate) * up``, which backward computes again: it is larger than its price."""
    gate, up = gate.contiguous(), up.contiguous()
    handle = _KeptGated.apply(gate, up, packed, scales, bias, impl)
    x = gated_silu(gate.detach(), up.detach(), impl=impl)
    return _Product.apply(handle, x, packed, scales.detach(), _detached(bias), impl)


class _Kept(torch.autograd.Function):
    """Keeps the operands; its output has the shape of the product and no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, impl: str) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.packed, ctx.impl = packed, impl
        return _handle(x, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, scales = ctx.saved_tensors
        needs_x, _, needs_scales, needs_bias, _ = ctx.needs_input_grad
        grad_scales = _grad_scales(ctx, x, scales, grad_output) if needs_scales else None
        grad_x = _grad_x(ctx, scales, grad_output) if needs_x else None
        return grad_x, None, grad_scales, _grad_bias(grad_output) if needs_bias else None, None


class _KeptGated(torch.autograd.Function):
    """The same for a layer on ``silu(gate) * up``, of which it keeps the factors."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, impl: str
    ) -> Tensor:
        ctx.save_for_backward(gate, up, scales)
        ctx.packed, ctx.impl = packed, impl
        return _handle(gate, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, scales = ctx.saved_tensors
        needs_gate, needs_up, _, needs_scales, needs_bias, _ = ctx.needs_input_grad
        grad_scales = grad_gate = grad_up = None
        if needs_scales:
            grad_scales = _grad_scales(ctx, gated_silu(gate, up, impl=ctx.impl), scales, grad_output)
        if needs_gate or needs_up:
            grad_gate, grad_up = gated_silu_grad_(gate, up, _grad_x(ctx, scales, grad_output), impl=ctx.impl)
        return grad_gate, grad_up, None, grad_scales, _grad_bias(grad_output) if needs_bias else None, None


def _handle(x: Tensor, packed: PackedWeight) -> Tensor:
    return x.new_empty(()).expand(*x.shape[:-1], packed.out_features)


def _grad_scales(ctx: Any, x: Tensor, scales: Tensor, grad_output: Tensor) -> Tensor:
    return scale_grad(x, grad_output, ctx.packed, impl=ctx.impl).to(scales.dtype)


def _grad_x(ctx: Any, scales: Tensor, grad_output: Tensor) -> Tensor:
    return grad_output @ dequant(ctx.packed, scales, grad_output.dtype, impl=ctx.impl)


def _grad_bias(grad_output: Tensor) -> Tensor:
    return grad_output.flatten(0, -2).sum(dim=0)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


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
