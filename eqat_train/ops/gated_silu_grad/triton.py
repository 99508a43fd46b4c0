"""Both gradients in one kernel; nothing is rounded before the results."""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gated_silu.triton import BLOCK
from ..gated_silu.triton import refusal as forward_refusal

__all__ = ["gated_silu_grad", "refusal"]


def refusal(gate: Tensor, up: Tensor, grad: Tensor) -> str | None:
    """Why these arguments cannot be computed here, or None."""
    if grad.shape != gate.shape or grad.dtype != gate.dtype:
        return f"grad is {grad.dtype} {tuple(grad.shape)} for a gate of {gate.dtype} {tuple(gate.shape)}"
    if not all(tensor.is_contiguous() for tensor in (gate, up, grad)):
        return "the kernel takes contiguous tensors"
    return forward_refusal(gate, up)


def gated_silu_grad(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`eqat_train.ops.gated_silu_grad.gated_silu_grad_`."""
    grad_gate = torch.empty_like(gate)
    grid = (max(1, triton.cdiv(gate.numel(), BLOCK)),)
    _kernel[grid](gate, up, grad, grad_gate, gate.numel(), SIZE=BLOCK, num_warps=8)
    return grad_gate, grad


@triton.jit
def _kernel(gate, up, grad, grad_gate, size, SIZE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < size
    g = tl.load(gate + index, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(grad_gate + index, (d * u * s * (1 + g * (1 - s))).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad + index, (d * g * s).to(grad.dtype.element_ty), mask=inside)
