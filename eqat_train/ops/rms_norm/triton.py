"""The norm in one pass over each row, forward and backward; backward keeps ``x`` alone."""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["refusal", "rms_norm"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 2**15


def refusal(x: Tensor, weight: Tensor, eps: float) -> str | None:
    """Why these arguments cannot be computed here, or None."""
    if x.dtype not in FLOATS or weight.dtype != x.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}; the kernel takes one of float16, bfloat16, float32"
    if x.shape[-1] > WIDEST:
        return f"rows have {x.shape[-1]} features; the kernel takes {WIDEST}"
    if weight.requires_grad:
        return "weight requires a gradient, which the kernel does not compute"
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`eqat_train.ops.rms_norm.rms_norm`."""
    return cast(Tensor, _RmsNorm.apply(x, weight, eps))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        x = x.contiguous()
        y = torch.empty_like(x)
        _launch(_forward_rows, x, (x, weight, y), eps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x = x.contiguous()
        grad = torch.empty_like(x)
        _launch(_backward_rows, x, (x, weight, grads[0].contiguous(), grad), ctx.eps)
        return grad, None, None


def _launch(kernel: Any, x: Tensor, tensors: tuple[Tensor, ...], eps: float) -> None:
    features = x.shape[-1]
    block = triton.next_power_of_2(features)
    if x.numel():
        kernel[(x.numel() // features,)](*tensors, features, eps, BLOCK=block, num_warps=max(1, min(16, block // 512)))


@triton.jit
def _forward_rows(x, weight, y, features, eps, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * features
    column = tl.arange(0, BLOCK)
    inside = column < features
    values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    factor = 1 / tl.sqrt_rn(tl.sum(values * values, axis=0) / features + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    rounded = (values * factor).to(x.dtype.element_ty)
    tl.store(y + start + column, (scale.to(tl.float32) * rounded.to(tl.float32)).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _backward_rows(x, weight, dy, dx, features, eps, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * features
    column = tl.arange(0, BLOCK)
    inside = column < features
    values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    factor = 1 / tl.sqrt_rn(tl.sum(values * values, axis=0) / features + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + start + column, mask=inside, other=0.0).to(tl.float32) * scale
    normal = values * factor
    along = tl.sum(grad * normal, axis=0) / features
    tl.store(dx + start + column, ((grad - normal * along) * factor).to(x.dtype.element_ty), mask=inside)
