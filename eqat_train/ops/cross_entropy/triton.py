"""Cross-entropy and its gradient: two passes over a row, the second out of the cache."""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cross_entropy", "refusal"]

BLOCK = 4096
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def refusal(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> str | None:
    """Why these arguments cannot be computed here, or None."""
    if logits.dtype not in FLOATS:
        return f"logits are {logits.dtype}; the kernel takes float16, bfloat16 and float32"
    if softcap is not None:
        return "the kernel does not cap logits"
    if not logits.is_contiguous():
        return "logits are not contiguous"
    return None


def cross_entropy(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    """See :func:`eqat_train.ops.cross_entropy.cross_entropy_`."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.numel():
        _rows[(logits.shape[0],)](logits, targets, losses, logits.shape[1], scale, BLOCK=BLOCK, num_warps=8)
    return losses


@triton.jit
def _rows(logits, targets, losses, vocabulary, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    target = tl.load(targets + row)
    start = logits + row.to(tl.int64) * vocabulary
    column = tl.arange(0, BLOCK)
    if target < 0:
        tl.store(losses + row, 0.0)
        for first in range(0, vocabulary, BLOCK):
            nothing = tl.zeros((BLOCK,), logits.dtype.element_ty)
            tl.store(start + first + column, nothing, mask=first + column < vocabulary)
    else:
        picked = tl.load(start + target).to(tl.float32)  # before any warp overwrites it
        # each lane keeps the maximum and the sum of its own columns, joined once at the end
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            inside = first + column < vocabulary
            values = tl.load(start + first + column, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, values)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - base) + tl.exp(values - base)
            top = higher
        peak = tl.max(top, axis=0)
        normalizer = peak + tl.log(tl.sum(total * tl.exp(top - peak), axis=0))
        tl.store(losses + row, (normalizer - picked) * scale)
        for first in range(0, vocabulary, BLOCK):
            inside = first + column < vocabulary
            values = tl.load(start + first + column, mask=inside, other=0.0).to(tl.float32)
            grad = tl.exp(values - normalizer) - tl.where(first + column == target, 1.0, 0.0)
            tl.store(start + first + column, (grad * scale).to(logits.dtype.element_ty), mask=inside)
