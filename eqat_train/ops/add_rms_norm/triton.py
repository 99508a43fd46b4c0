"""Residual addition and RMS normalization as one kernel: a program a row, which it holds in registers.

Backward is one kernel too and keeps the sum alone.
"""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launches import may_overlap
from ..overlap import begin, wait_for_inputs

__all__ = ["add_rms_norm", "refusal"]

LARGEST_ROW = 16384


def refusal(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> str | None:
    """Why the kernel cannot compute this, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or weight.dtype != x.dtype:
        return f"takes float16, bfloat16 or float32, all of one dtype, and got {x.dtype} and {weight.dtype}"
    if delta is not None and (delta.shape != x.shape or delta.dtype != x.dtype):
        return f"delta is {delta.dtype} {tuple(delta.shape)} for x of {x.dtype} {tuple(x.shape)}"
    if x.shape[-1] > LARGEST_ROW:
        return f"rows hold at most {LARGEST_ROW} features, and these have {x.shape[-1]}"
    if weight.requires_grad:
        return "weight requires a gradient, which the kernel does not compute"
    return None


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See :func:`eqat_train.ops.add_rms_norm.add_rms_norm`."""
    if torch.is_grad_enabled() and (x.requires_grad or (delta is not None and delta.requires_grad)):
        total = x if delta is None else x + delta
        return total, cast(Tensor, _Norm.apply(total, weight, epsilon))
    return _forward(x, delta, weight, epsilon)


def _forward(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    rows = x.contiguous()
    added = rows if delta is None else delta.contiguous()
    features = x.shape[-1]
    normed = torch.empty_like(rows)
    total = x if delta is None else torch.empty_like(rows)
    warps, overlap = _warps(features), may_overlap(x.device)
    if x.numel():
        _kernel[(x.numel() // features,)](
            rows,
            added,
            weight,
            total,
            normed,
            features,
            epsilon,
            ADD=delta is not None,
            BLOCK=triton.next_power_of_2(features),
            OVERLAP=overlap,
            num_warps=warps,
            launch_pdl=overlap,
        )
    return total, normed


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return _forward(x, None, weight, epsilon)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x, features = x.contiguous(), x.shape[-1]
        grad = torch.empty_like(x)
        if x.numel():
            _backward_kernel[(x.numel() // features,)](
                x,
                weight,
                grads[0].contiguous(),
                grad,
                features,
                ctx.epsilon,
                BLOCK=triton.next_power_of_2(features),
                num_warps=_warps(features),
            )
        return grad, None, None


def _warps(features: int) -> int:
    return min(16, max(1, triton.next_power_of_2(features) // 512))


@triton.jit
def _kernel(
    x,
    delta,
    weight,
    total,
    normed,
    features,
    epsilon,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    start = tl.program_id(0).to(tl.int64) * features
    column = tl.arange(0, BLOCK)
    inside = column < features
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    value = tl.load(x + start + column, inside, other=0.0).to(tl.float32)
    if ADD:
        value = value + tl.load(delta + start + column, inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)  # the sum that is stored is the one that is normalized
        tl.store(total + start + column, value, inside)
        value = value.to(tl.float32)
    quotient = (value * tl.rsqrt(tl.sum(value * value, 0) / features + epsilon)).to(normed.dtype.element_ty)
    tl.store(normed + start + column, (scale * quotient.to(tl.float32)).to(normed.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(x, weight, dy, dx, features, epsilon, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * features
    column = tl.arange(0, BLOCK)
    inside = column < features
    value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, axis=0) / features + epsilon)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + start + column, mask=inside, other=0.0).to(tl.float32) * scale
    normal = value * factor
    along = tl.sum(grad * normal, axis=0) / features
    tl.store(dx + start + column, ((grad - normal * along) * factor).to(x.dtype.element_ty), mask=inside)
