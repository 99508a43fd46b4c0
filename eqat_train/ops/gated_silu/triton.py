"""The activation in one kernel; its gradients are :mod:`eqat_train.ops.gated_silu_grad`."""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..gated_silu_grad import gated_silu_grad_

__all__ = ["gated_silu", "refusal"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = 4096


def refusal(gate: Tensor, up: Tensor) -> str | None:
    """Why these arguments cannot be computed here, or None."""
    if gate.dtype not in FLOATS or up.dtype != gate.dtype:
        return f"gate is {gate.dtype} and up {up.dtype}; the kernel takes one of float16, bfloat16, float32"
    if gate.shape != up.shape:
        return f"gate is {tuple(gate.shape)} and up {tuple(up.shape)}; the kernel takes equal shapes"
    return None


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`eqat_train.ops.gated_silu.gated_silu`; nothing is rounded before the result."""
    return cast(Tensor, _GatedSilu.apply(gate, up))


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        grid = (max(1, triton.cdiv(y.numel(), BLOCK)),)
        _kernel[grid](gate, up, y, y.numel(), SIZE=BLOCK, num_warps=8)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        # the incoming gradient may be another's too
        copy = grads[0].clone(memory_format=torch.contiguous_format)
        gate, up = ctx.saved_tensors
        return gated_silu_grad_(gate, up, copy, impl="triton")


@triton.jit
def _kernel(gate, up, y, size, SIZE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < size
    g = tl.load(gate + index, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + index, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)
