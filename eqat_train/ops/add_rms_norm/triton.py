"""Residual addition and RMS normalization as one kernel: a program a row, which it holds in registers."""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..overlap import begin, may_overlap, wait_for_inputs

__all__ = ["add_rms_norm", "refusal"]

LARGEST_ROW = 16384


def refusal(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> str | None:
    """Why the kernel cannot compute this, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or weight.dtype != x.dtype:
        return f"takes float16, bfloat16 or float32, all of one dtype, and got {x.dtype} and {weight.dtype}"
    if x.dim() != 2 or not x.is_contiguous() or (delta is not None and not delta.is_contiguous()):
        return "takes contiguous [rows, features]"
    if x.shape[1] > LARGEST_ROW:
        return f"rows hold at most {LARGEST_ROW} features, and these have {x.shape[1]}"
    return None


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See :func:`eqat_train.ops.add_rms_norm.add_rms_norm`."""
    rows, features = x.shape
    normed = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    block = triton.next_power_of_2(features)
    warps, overlap = min(16, max(1, block // 512)), may_overlap(x.device)
    _kernel[(rows,)](
        x,
        x if delta is None else delta,
        weight,
        total,
        normed,
        features,
        epsilon,
        ADD=delta is not None,
        BLOCK=block,
        OVERLAP=overlap,
        num_warps=warps,
        launch_pdl=overlap,
    )
    return total, normed


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
    quotient = value * tl.rsqrt(tl.sum(value * value, 0) / features + epsilon)
    tl.store(normed + start + column, (scale * quotient).to(normed.dtype.element_ty), inside)
