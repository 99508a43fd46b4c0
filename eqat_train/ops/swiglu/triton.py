"""The gated activation as one elementwise kernel."""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..overlap import begin, may_overlap, wait_for_inputs

__all__ = ["refusal", "swiglu"]

BLOCK = 512


def refusal(gate_up: Tensor) -> str | None:
    """Why the kernel cannot compute this, or None."""
    if gate_up.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 or float32, and got {gate_up.dtype}"
    if gate_up.dim() != 2 or not gate_up.is_contiguous() or gate_up.shape[1] % 2:
        return "takes contiguous [rows, 2 * features]"
    return None


def swiglu(gate_up: Tensor) -> Tensor:
    """See :func:`eqat_train.ops.swiglu.swiglu`."""
    rows, features = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, features)
    overlap = may_overlap(gate_up.device)
    grid = (triton.cdiv(features, BLOCK), rows)
    _kernel[grid](gate_up, out, features, SIZE=BLOCK, OVERLAP=overlap, num_warps=2, launch_pdl=overlap)
    return out


@triton.jit
def _kernel(gate_up, out, features, SIZE: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = column < features
    wait_for_inputs(OVERLAP)
    gate = tl.load(gate_up + 2 * row * features + column, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * features + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * features + column, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), inside)
