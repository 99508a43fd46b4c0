"""The embedding in one kernel; backward is the transposed rotation of the gradient and keeps no activation."""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["refusal", "rotary"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def refusal(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why these arguments cannot be computed here, or None."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}; the kernel takes float16, bfloat16 and float32"
    batch, tokens, _, head_dim = x.shape
    if head_dim % 2 or cos.shape != sin.shape or cos.shape not in ((1, tokens, head_dim), (batch, tokens, head_dim)):
        return f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)} for x of {tuple(x.shape)}"
    return None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`eqat_train.ops.rotary.rotary`; nothing is rounded before the result."""
    return cast(Tensor, _Rotary.apply(x, cos.contiguous(), sin.contiguous()))


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, transposed=True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool) -> Tensor:
    batch, tokens, heads, head_dim = x.shape
    x = x.contiguous()
    y = torch.empty_like(x)
    period = tokens if cos.shape[0] == 1 else batch * tokens
    if x.numel():
        _tokens[(batch * tokens,)](
            x,
            cos,
            sin,
            y,
            heads,
            head_dim // 2,
            period,
            TRANSPOSED=transposed,
            HEADS=triton.next_power_of_2(heads),
            HALF=triton.next_power_of_2(head_dim // 2),
            num_warps=4,
        )
    return y


@triton.jit
def _tokens(x, cos, sin, y, heads, half, period, TRANSPOSED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0)
    head, lane = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    start = token.to(tl.int64) * heads * half * 2 + head * half * 2 + lane
    inside = (head < heads) & (lane < half)
    a = tl.load(x + start, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + start + half, mask=inside, other=0.0).to(tl.float32)
    angle = (token % period).to(tl.int64) * half * 2 + lane
    known = lane < half
    cos_a = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + half, mask=known, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + half, mask=known, other=0.0).to(tl.float32)
    if TRANSPOSED:
        first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(y + start, first.to(y.dtype.element_ty), mask=inside)
    tl.store(y + start + half, second.to(y.dtype.element_ty), mask=inside)
