"""Attention of one new token in plain torch, over the whole cache with a mask, so that no length reaches the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..add_rms_norm.reference import add_rms_norm

if TYPE_CHECKING:
    from . import AttentionCache, HeadNorms

__all__ = ["decode_attention", "rotate", "split_heads"]


def decode_attention(
    qkv: Tensor, cache: AttentionCache, position: Tensor, scale: float, norms: HeadNorms | None
) -> Tensor:
    """See :func:`eqat_train.ops.decode_attention.decode_attention_`."""
    kv_heads, length, head_dim = cache.keys.shape
    query, key, value = split_heads(qkv, kv_heads, head_dim, norms)  # [heads, 1, head_dim]
    cos, sin = cache.cos[position], cache.sin[position]
    cache.keys.index_copy_(1, position, rotate(key, cos, sin))
    cache.values.index_copy_(1, position, value)
    seen = torch.arange(length, device=qkv.device) <= position
    out = F.scaled_dot_product_attention(
        rotate(query, cos, sin).unsqueeze(0),
        cache.keys.unsqueeze(0),
        cache.values.unsqueeze(0),
        attn_mask=seen.view(1, 1, 1, length),
        scale=scale,
        enable_gqa=query.shape[0] != kv_heads,
    )
    return out.reshape(1, -1)


def split_heads(qkv: Tensor, kv_heads: int, head_dim: int, norms: HeadNorms | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[heads, tokens, head_dim]`` of ``[tokens, features]``, normalized, not rotated."""
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    count = heads.shape[1] - 2 * kv_heads
    query, key, value = heads.transpose(0, 1).split([count, kv_heads, kv_heads])
    if norms is not None:
        _, query = add_rms_norm(query, None, norms.query, norms.epsilon)
        _, key = add_rms_norm(key, None, norms.key, norms.epsilon)
    return query, key, value


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``[heads, tokens, head_dim]`` with ``cos`` and ``sin`` ``[tokens, head_dim]``."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
