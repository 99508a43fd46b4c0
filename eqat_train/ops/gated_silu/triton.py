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
from ..launches import may_overlap
from ..overlap import begin, wait_for_inputs

__all__ = ["gated_silu", "refusal"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = 4096
# A decoding step's: smaller blocks on more processors, started before the kernel in front of it has ended.
SMALL, SMALL_BLOCK = 2**20, 512


def refusal(gate: Tensor, up: Tensor) -> str | None:
    """Why these arguments cannot be computed here, or None."""
    if gate.dtype not in FLOATS or up.dtype != gate.dtype:
        return f"gate is {gate.dtype} and up {up.dtype}; the kernel takes one of float16, bfloat16, float32"
    if gate.shape != up.shape:
        return f"gate is {tuple(gate.shape)} and up {tuple(up.shape)}; the kernel takes equal shapes"
    return None


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`eqat_train.ops.gated_silu.gated_silu`; nothing is rounded before the result."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return cast(Tensor, _GatedSilu.apply(gate, up))
    return _forward(gate, up)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    # the halves of a matrix [rows, 2 * features] are taken where they lie
    halves = gate.dim() == 2 and gate.stride(1) == up.stride(1) == 1 and not gate.is_contiguous()
    if not halves:
        gate, up = gate.contiguous(), up.contiguous()
    rows, features = (gate.shape[0], gate.shape[1]) if halves else (1, gate.numel())
    small = y.numel() <= SMALL
    block, overlap = SMALL_BLOCK if small else BLOCK, small and may_overlap(gate.device)
    _kernel[(max(1, triton.cdiv(features, block)), max(1, rows))](
        gate,
        up,
        y,
        features,
        gate.stride(0) if halves else 0,
        up.stride(0) if halves else 0,
        SIZE=block,
        OVERLAP=overlap,
        num_warps=2 if small else 8,
        launch_pdl=overlap,
    )
    return y


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        # the incoming gradient may be another's too
        copy = grads[0].clone(memory_format=torch.contiguous_format)
        gate, up = ctx.saved_tensors
        return gated_silu_grad_(gate, up, copy, impl="triton")


@triton.jit
def _kernel(gate, up, y, features, gate_stride, up_stride, SIZE: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = column < features
    wait_for_inputs(OVERLAP)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * features + column, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)
