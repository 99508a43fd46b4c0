"""Attention of one new token on a key-value cache, with all that comes between two linears. For inference.

Normalization of queries and keys where a model has it, rotary position embedding, the cache's new row, attention over
the rows so far.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..dispatch import run

__all__ = ["AttentionCache", "HeadNorms", "decode_attention_"]


@dataclass(frozen=True, eq=False)
class AttentionCache:
    """A layer's keys and values, and what positions mean.

    Attributes:
        keys: floating ``[kv_heads, length, head_dim]``, rotated.
        values: as ``keys``.
        cos: ``[length, head_dim]`` in the same dtype; its halves are equal, as transformers makes them.
        sin: as ``cos``.
    """

    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """RMS normalization of each head's query and key: weights ``[head_dim]``, and epsilon."""

    query: Tensor
    key: Tensor
    epsilon: float


def decode_attention_(
    qkv: Tensor,
    cache: AttentionCache,
    position: Tensor,
    scale: float,
    norms: HeadNorms | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Attention of the token at ``position`` to itself and all before it; its key and value go into the cache.

    Args:
        qkv: ``[1, (heads + 2 * kv_heads) * head_dim]``: queries, keys, values; ``heads`` is a multiple of ``kv_heads``
            and consecutive queries share a key.
        cache: its rows before ``position`` are filled.
        position: int64 ``[1]`` on the device, below the cache's length.
        scale: of the scores.
        norms: before the rotation, or None.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        ``[1, heads * head_dim]`` in the dtype of ``qkv``.
    """
    return run("decode_attention", impl, qkv.device, qkv, cache, position, scale, norms)
