"""Autograd of a packed linear layer around its kernels: dequantize, a dense matmul, forget; again in backward.

The graph has two nodes where one would do. The first keeps what backward needs before the product is computed, so that
checkpointing, which stops recomputing as soon as everything kept is there again, never repeats a layer's last product.
"""

from __future__ import annotations

from collections.abc import Sequence
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

__all__ = ["trained_gated_linear", "trained_linear", "trained_linears"]


def trained_linear(x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    """See :func:`eqat_train.ops.dequant_matmul.dequant_matmul`; ``impl`` is that of ``dequant`` and ``scale_grad``."""
    return trained_linears(x, [(packed, scales, bias)], impl)[0]


def trained_linears(x: Tensor, layers: Sequence[tuple[PackedWeight, Tensor, Tensor | None]], impl: str) -> list[Tensor]:
    """Several layers of one input, given by their codes, scales and bias; their products add up its gradient."""
    packed, scales, biases = zip(*layers, strict=True)
    handles = _Kept.apply(x, packed, impl, *scales, *biases)
    x = x.detach()
    return [
        _Product.apply(handle, x, codes, scale.detach(), _detached(bias), impl)
        for handle, codes, scale, bias in zip(handles, packed, scales, biases, strict=True)
    ]


def trained_gated_linear(
    gate: Tensor, up: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, impl: str
) -> Tensor:
    """The layer on ``silu(gate) * up``, which backward computes again: it is larger than its price."""
    gate, up = gate.contiguous(), up.contiguous()
    handle = _KeptGated.apply(gate, up, packed, scales, bias, impl)
    x = gated_silu(gate.detach(), up.detach(), impl=impl)
    return _Product.apply(handle, x, packed, scales.detach(), _detached(bias), impl)


class _Kept(torch.autograd.Function):
    """Keeps the operands; its outputs have the shapes of the products and no memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: tuple[PackedWeight, ...], impl: str, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *parameters[: len(packed)])
        ctx.packed, ctx.impl = packed, impl
        return tuple(_handle(x, codes) for codes in packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *scales = ctx.saved_tensors
        needs_x, _, _, *needs = ctx.needs_input_grad
        layers = list(zip(ctx.packed, scales, grads, strict=True))
        grad_scales = [
            _grad_scales(x, *layer, ctx.impl) if need else None for need, layer in zip(needs, layers, strict=False)
        ]
        grad_x: Tensor | None = None
        for codes, scale, grad in layers if needs_x else ():
            rows, weight = grad.flatten(0, -2), dequant(codes, scale, grad.dtype, impl=ctx.impl)
            grad_x = rows @ weight if grad_x is None else grad_x.addmm_(rows, weight)
            del weight
        grad_biases = [
            _grad_bias(grad) if need else None for need, grad in zip(needs[len(grads) :], grads, strict=True)
        ]
        return None if grad_x is None else grad_x.view(x.shape), None, None, *grad_scales, *grad_biases


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
        packed: PackedWeight = ctx.packed
        needs_gate, needs_up, _, needs_scales, needs_bias, _ = ctx.needs_input_grad
        grad_scales = grad_gate = grad_up = None
        if needs_scales:
            x = gated_silu(gate, up, impl=ctx.impl)
            grad_scales = _grad_scales(x, packed, scales, grad_output, ctx.impl)
            del x
        if needs_gate or needs_up:
            grad_x = grad_output @ dequant(packed, scales, grad_output.dtype, impl=ctx.impl)
            grad_gate, grad_up = gated_silu_grad_(gate, up, grad_x, impl=ctx.impl)
        return grad_gate, grad_up, None, grad_scales, _grad_bias(grad_output) if needs_bias else None, None


def _handle(x: Tensor, packed: PackedWeight) -> Tensor:
    return x.new_empty(()).expand(*x.shape[:-1], packed.out_features)


def _grad_scales(x: Tensor, packed: PackedWeight, scales: Tensor, grad_output: Tensor, impl: str) -> Tensor:
    return scale_grad(x, grad_output, packed, impl=impl).to(scales.dtype)


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
