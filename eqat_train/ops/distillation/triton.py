"""Distillation loss and its gradient: two passes over a row of each model, the second out of the cache."""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["distillation", "refusal"]

BLOCK = 2048
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def refusal(
    logits: Tensor, teacher: Tensor, targets: Tensor, share: float, scale: float, softcap: float | None
) -> str | None:
    """Why these arguments cannot be computed here, or None."""
    if logits.dtype not in FLOATS or teacher.dtype != logits.dtype:
        return f"logits are {logits.dtype} and {teacher.dtype}; the kernel takes one of float16, bfloat16 and float32"
    if softcap is not None:
        return "the kernel does not cap logits"
    if not (logits.is_contiguous() and teacher.is_contiguous()):
        return "logits are not contiguous"
    return None


def distillation(
    logits: Tensor, teacher: Tensor, targets: Tensor, share: float, scale: float, softcap: float | None
) -> Tensor:
    """See :func:`eqat_train.ops.distillation.distillation_`."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.numel():
        _rows[(logits.shape[0],)](
            logits, teacher, targets, losses, logits.shape[1], share, scale, BLOCK=BLOCK, num_warps=8
        )
    return losses


@triton.jit
def _rows(logits, teacher, targets, losses, vocabulary, share, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    target = tl.load(targets + row)
    student = logits + row.to(tl.int64) * vocabulary
    wanted = teacher + row.to(tl.int64) * vocabulary
    column = tl.arange(0, BLOCK)
    if target < 0:
        tl.store(losses + row, 0.0)
        for first in range(0, vocabulary, BLOCK):
            nothing = tl.zeros((BLOCK,), logits.dtype.element_ty)
            tl.store(student + first + column, nothing, mask=first + column < vocabulary)
    else:
        picked = tl.load(student + target).to(tl.float32)  # before any warp overwrites it
        # each lane keeps the maximum and the sum of its own columns, joined once at the end
        top_p, top_q = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
        sum_p, sum_q = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            inside = first + column < vocabulary
            x = tl.load(student + first + column, mask=inside, other=float("-inf")).to(tl.float32)
            y = tl.load(wanted + first + column, mask=inside, other=float("-inf")).to(tl.float32)
            top_p, sum_p = _join(top_p, sum_p, x)
            top_q, sum_q = _join(top_q, sum_q, y)
        peak_p, peak_q = tl.max(top_p, axis=0), tl.max(top_q, axis=0)
        norm_p = peak_p + tl.log(tl.sum(sum_p * tl.exp(top_p - peak_p), axis=0))
        norm_q = peak_q + tl.log(tl.sum(sum_q * tl.exp(top_q - peak_q), axis=0))
        divergence = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            inside = first + column < vocabulary
            log_p = tl.load(student + first + column, mask=inside, other=0.0).to(tl.float32) - norm_p
            log_q = tl.load(wanted + first + column, mask=inside, other=0.0).to(tl.float32) - norm_q
            q = tl.where(inside, tl.exp(log_q), 0.0)
            divergence += q * (log_q - log_p)
            grad = tl.exp(log_p) - share * q - tl.where(first + column == target, 1.0 - share, 0.0)
            tl.store(student + first + column, (grad * scale).to(logits.dtype.element_ty), mask=inside)
        tl.store(losses + row, (share * tl.sum(divergence, axis=0) + (1.0 - share) * (norm_p - picked)) * scale)


@triton.jit
def _join(top, total, values):
    """Maximum and sum of exponentials with one more value a lane."""
    higher = tl.maximum(top, values)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(top - base) + tl.exp(values - base)
