"""Attention of one new token as two kernels: parts of the cache in parallel, then their combination.

A program takes one key-value head, all queries that share it, and one part of the rows so far. Where several queries
share a key they are padded to the 16 rows that a tensor core wants. The new key and value come from registers, since a
program does not see what another one writes; the program that has their row writes them to the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from ..launches import may_overlap
from .kernels import attend, attend_alone, combine

if TYPE_CHECKING:
    from . import AttentionCache, HeadNorms

__all__ = ["decode_attention", "refusal"]

QUERIES = 16
ROWS = 32
PROGRAMS = 128  # about one for each multiprocessor of a large GPU


def refusal(qkv: Tensor, cache: AttentionCache, position: Tensor, scale: float, norms: HeadNorms | None) -> str | None:
    """Why the kernel cannot compute this, or None."""
    kv_heads, _, head_dim = cache.keys.shape
    if qkv.dtype not in (torch.float16, torch.bfloat16, torch.float32) or cache.keys.dtype != qkv.dtype:
        return f"takes float16, bfloat16 or float32, all of one dtype, and got {qkv.dtype} and {cache.keys.dtype}"
    if cache.keys[0].numel() >= 2**31:
        return f"a head of {cache.keys.shape[1]} x {head_dim} values; it takes fewer than 2**31"
    if head_dim not in (16, 32, 64, 128, 256):
        return f"head_dim is {head_dim}; it takes 16, 32, 64, 128 and 256"
    if qkv.shape[1] // head_dim - 2 * kv_heads > QUERIES * kv_heads:
        return f"more than {QUERIES} queries share a key"
    if not (qkv.is_contiguous() and cache.keys.is_contiguous() and cache.values.is_contiguous()):
        return "takes contiguous tensors"
    return None


def decode_attention(
    qkv: Tensor, cache: AttentionCache, position: Tensor, scale: float, norms: HeadNorms | None
) -> Tensor:
    """See :func:`eqat_train.ops.decode_attention.decode_attention_`."""
    kv_heads, length, head_dim = cache.keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    parts = min(triton.next_power_of_2(triton.cdiv(PROGRAMS, kv_heads)), 32, triton.cdiv(length, ROWS))
    overlap = may_overlap(qkv.device)
    out = qkv.new_empty(1, heads * head_dim)
    sums = torch.empty(heads, parts, head_dim, dtype=torch.float32, device=qkv.device)
    weights = torch.empty(2, heads, parts, dtype=torch.float32, device=qkv.device)  # largest score, sum of exponentials
    arguments = (
        qkv,
        cache.keys,
        cache.values,
        cache.cos,
        cache.sin,
        norms.query if norms else cache.cos,
        norms.key if norms else cache.cos,
        position,
        sums,
        weights,
        length,
        kv_heads,
        scale,
        norms.epsilon if norms else 0.0,
    )
    settings = {
        "HEAD_DIM": head_dim,
        "PARTS": parts,
        "NORMS": norms is not None,
        "ROWS": ROWS,
        "OVERLAP": overlap,
        "launch_pdl": overlap,
    }
    if heads == kv_heads:
        attend_alone[(heads, parts)](*arguments, **settings, num_warps=8)
    else:
        wide = qkv.device.type == "cpu"  # Triton's interpreter has no bfloat16 matmul
        attend[(kv_heads, parts)](
            *arguments, GROUP=heads // kv_heads, QUERIES=QUERIES, WIDE=wide, **settings, num_warps=4
        )
    combine[(heads,)](
        sums,
        weights,
        out,
        heads,
        HEAD_DIM=head_dim,
        PARTS=parts,
        BLOCK=triton.next_power_of_2(parts),
        OVERLAP=overlap,
        launch_pdl=overlap,
    )
    return out
