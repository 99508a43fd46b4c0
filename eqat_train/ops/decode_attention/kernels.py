"""The kernels of decode_attention."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["attend", "combine"]


@triton.jit
def _rotated(
    heads: Any,
    mask: Any,
    norm: Any,
    cos: Any,
    sin: Any,
    epsilon: Any,
    NORMS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
) -> Any:
    """Heads ``[rows, head_dim]`` behind the pointers ``[rows, 1]``, normalized and rotated, in their dtype."""
    column = tl.arange(0, HEAD_DIM)
    half: tl.constexpr = HEAD_DIM // 2
    other = (column + half) % HEAD_DIM
    value = tl.load(heads + column[None, :], mask, other=0.0)
    partner = tl.load(heads + other[None, :], mask, other=0.0)
    if NORMS:
        wide = value.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 1) / HEAD_DIM + epsilon)[:, None]
        value = tl.load(norm + column)[None, :] * (wide * factor).to(value.dtype)
        partner = tl.load(norm + other)[None, :] * (partner.to(tl.float32) * factor).to(value.dtype)
    sign = tl.where(column < half, -1.0, 1.0)[None, :]
    turned = value.to(tl.float32) * cos[None, :] + sign * partner.to(tl.float32) * sin[None, :]
    return turned.to(value.dtype)


@triton.jit
def attend(
    qkv: Any,
    keys: Any,
    values: Any,
    cos_table: Any,
    sin_table: Any,
    query_norm: Any,
    key_norm: Any,
    position: Any,
    sums: Any,
    weights: Any,
    length: Any,
    kv_heads: Any,
    scale: Any,
    epsilon: Any,
    GROUP: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    NORMS: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
) -> None:
    """One part of the rows for one key-value head: unnormalized sums of values, largest score, sum of exponentials."""
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    new = tl.load(position)
    column = tl.arange(0, HEAD_DIM)
    cos = tl.load(cos_table + new * HEAD_DIM + column).to(tl.float32)
    sin = tl.load(sin_table + new * HEAD_DIM + column).to(tl.float32)

    member = tl.arange(0, QUERIES)
    query_head = head * GROUP + member
    real = (member < GROUP)[:, None]
    query = _rotated(qkv + query_head[:, None] * HEAD_DIM, real, query_norm, cos, sin, epsilon, NORMS, HEAD_DIM)
    one = tl.zeros([1, 1], tl.int64)
    key_head = kv_heads * GROUP + head
    new_key = _rotated(qkv + one + key_head * HEAD_DIM, one == 0, key_norm, cos, sin, epsilon, NORMS, HEAD_DIM)
    new_value = tl.load(qkv + (key_head + kv_heads) * HEAD_DIM + column)[None, :]

    # parts are multiples of ROWS, so that the loop's tiles belong to one part; late parts may be empty
    blocks = tl.cdiv(new + 1, ROWS)
    share = tl.cdiv(blocks, PARTS) * ROWS
    first = part * share
    last = tl.minimum(first + share, new + 1)
    base = head * length * HEAD_DIM
    if (first <= new) & (new < first + share):
        tl.store(keys + base + new * HEAD_DIM + column[None, :], new_key)
        tl.store(values + base + new * HEAD_DIM + column[None, :], new_value)

    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sum_of_values = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        old = (row < new)[:, None]
        here = base + row[:, None] * HEAD_DIM + column[None, :]
        key = tl.where((row == new)[:, None], new_key, tl.load(keys + here, old, other=0.0))
        value = tl.where((row == new)[:, None], new_value, tl.load(values + here, old, other=0.0))
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where((row <= new)[None, :], score, float("-inf"))
        above = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp(score - above[:, None])
        shrink = tl.exp(largest - above)
        total = total * shrink + tl.sum(weight, 1)
        sum_of_values = sum_of_values * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        largest = above

    place = query_head * PARTS + part
    heads = kv_heads * GROUP
    tl.store(sums + place[:, None] * HEAD_DIM + column[None, :], sum_of_values, real)
    tl.store(weights + place, largest, member < GROUP)
    tl.store(weights + heads * PARTS + place, total, member < GROUP)


@triton.jit
def combine(
    sums: Any,
    weights: Any,
    out: Any,
    heads: Any,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """The parts of one query head together."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    column = tl.arange(0, HEAD_DIM)
    inside = part < PARTS
    largest = tl.load(weights + head * PARTS + part, inside, other=float("-inf"))
    total = tl.load(weights + (heads + head) * PARTS + part, inside, other=0.0)
    factor = tl.exp(largest - tl.max(largest, 0))  # 0 for parts without rows
    values = tl.load(sums + (head * PARTS + part)[:, None] * HEAD_DIM + column[None, :], inside[:, None], other=0.0)
    result = tl.sum(values * factor[:, None], 0) / tl.sum(total * factor, 0)
    tl.store(out + head * HEAD_DIM + column, result.to(out.dtype.element_ty))
