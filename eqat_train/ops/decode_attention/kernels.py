"""The kernels of decode_attention."""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..overlap import begin, wait_for_inputs

__all__ = ["attend", "attend_alone", "combine"]

LOWEST = tl.constexpr(-1e30)  # in place of minus infinity, whose difference from itself is no number


@triton.jit
def _rotated(
    heads,
    mask,
    norm,
    cos,
    sin,
    epsilon,
    NORMS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Heads ``[rows, head_dim]`` behind the pointers ``[rows, 1]``, normalized and rotated, in their dtype."""
    column = tl.arange(0, HEAD_DIM)
    half: tl.constexpr = HEAD_DIM // 2
    other = (column + half) % HEAD_DIM
    value = tl.load(heads + column[None, :], mask, other=0.0).to(tl.float32)
    partner = tl.load(heads + other[None, :], mask, other=0.0).to(tl.float32)
    if NORMS:
        factor = tl.rsqrt(tl.sum(value * value, 1) / HEAD_DIM + epsilon)[:, None]
        value = value * factor * tl.load(norm + column).to(tl.float32)[None, :]
        partner = partner * factor * tl.load(norm + other).to(tl.float32)[None, :]
    sign = tl.where(column < half, -1.0, 1.0)[None, :]
    turned = value * cos[None, :] + sign * partner * sin[None, :]
    return turned.to(heads.dtype.element_ty)


@triton.jit
def attend(
    qkv,
    keys,
    values,
    cos_table,
    sin_table,
    query_norm,
    key_norm,
    position,
    sums,
    weights,
    length,
    kv_heads,
    scale,
    epsilon,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    NORMS: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One part of the rows for one key-value head: unnormalized sums of values, largest score, sum of exponentials."""
    begin(OVERLAP)
    wait_for_inputs(OVERLAP)  # the position too was written by a kernel, a step ago
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    new = tl.load(position).to(tl.int32)  # offsets within a head fit 32 bits
    column = tl.arange(0, HEAD_DIM)
    cos = tl.load(cos_table + new * HEAD_DIM + column).to(tl.float32)
    sin = tl.load(sin_table + new * HEAD_DIM + column).to(tl.float32)

    member = tl.arange(0, QUERIES)
    query_head = head * GROUP + member
    real = (member < GROUP)[:, None]
    query = _rotated(qkv + query_head[:, None] * HEAD_DIM, real, query_norm, cos, sin, epsilon, NORMS, HEAD_DIM)
    if WIDE:
        query = query.to(tl.float32)
    one = tl.zeros([1, 1], tl.int64)
    key_head = kv_heads * GROUP + head
    new_key = _rotated(qkv + one + key_head * HEAD_DIM, one == 0, key_norm, cos, sin, epsilon, NORMS, HEAD_DIM)
    new_value = tl.load(qkv + (key_head + kv_heads) * HEAD_DIM + column)[None, :]

    # parts are multiples of ROWS, so that the loop's tiles belong to one part; late parts may be empty
    blocks = tl.cdiv(new + 1, ROWS)
    share = tl.cdiv(blocks, PARTS) * ROWS
    first = part * share
    last = tl.minimum(first + share, new + 1)
    keys += head * length * HEAD_DIM
    values += head * length * HEAD_DIM
    if (first <= new) & (new < first + share):
        tl.store(keys + new * HEAD_DIM + column[None, :], new_key)
        tl.store(values + new * HEAD_DIM + column[None, :], new_value)

    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sum_of_values = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        old = (row < new)[:, None]
        here = row[:, None] * HEAD_DIM + column[None, :]
        key = tl.where((row == new)[:, None], new_key, tl.load(keys + here, old, other=0.0))
        value = tl.where((row == new)[:, None], new_value, tl.load(values + here, old, other=0.0))
        if WIDE:
            key, value = key.to(tl.float32), value.to(tl.float32)
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
def attend_alone(
    qkv,
    keys,
    values,
    cos_table,
    sin_table,
    query_norm,
    key_norm,
    position,
    sums,
    weights,
    length,
    heads,
    scale,
    epsilon,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    NORMS: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """As ``attend`` where no two queries share a key: products of vectors, which wait for each other less often.

    A part takes every PARTS-th tile of rows, so that the first one is known, and under way, before the position is.
    Each row of the tile has a running maximum and sum of its own; rows are brought together once, at the end.
    """
    begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, HEAD_DIM)
    keys += head * length * HEAD_DIM
    values += head * length * HEAD_DIM
    row = part * ROWS + tl.arange(0, ROWS)
    here = row[:, None] * HEAD_DIM + column[None, :]
    key = tl.load(keys + here, (row < length)[:, None], other=0.0)
    value = tl.load(values + here, (row < length)[:, None], other=0.0)
    new_value = tl.load(qkv + (head + 2 * heads) * HEAD_DIM + column)[None, :]
    new = tl.load(position).to(tl.int32)
    cos = tl.load(cos_table + new * HEAD_DIM + column).to(tl.float32)
    sin = tl.load(sin_table + new * HEAD_DIM + column).to(tl.float32)
    one = tl.zeros([1, 1], tl.int64)
    query = _rotated(qkv + one + head * HEAD_DIM, one == 0, query_norm, cos, sin, epsilon, NORMS, HEAD_DIM)
    new_key = _rotated(qkv + one + (head + heads) * HEAD_DIM, one == 0, key_norm, cos, sin, epsilon, NORMS, HEAD_DIM)
    if new // ROWS % PARTS == part:
        tl.store(keys + new * HEAD_DIM + column[None, :], new_key)
        tl.store(values + new * HEAD_DIM + column[None, :], new_value)

    query = query.to(tl.float32) * scale
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_of_values = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for start in range(part * ROWS, new + 1, PARTS * ROWS):
        row = start + tl.arange(0, ROWS)
        this_key = tl.where((row == new)[:, None], new_key, key).to(tl.float32)
        this_value = tl.where((row == new)[:, None], new_value, value).to(tl.float32)
        later = row + PARTS * ROWS
        here = later[:, None] * HEAD_DIM + column[None, :]
        key = tl.load(keys + here, (later < new)[:, None], other=0.0)
        value = tl.load(values + here, (later < new)[:, None], other=0.0)
        # rows that are not filled may hold anything
        score = tl.where(row <= new, tl.sum(this_key * query, 1), float("-inf"))
        this_value = tl.where((row <= new)[:, None], this_value, 0.0)
        above = tl.maximum(tl.maximum(largest, score), LOWEST)
        weight = tl.exp(score - above)
        shrink = tl.exp(largest - above)
        total = total * shrink + weight
        sum_of_values = sum_of_values * shrink[:, None] + weight[:, None] * this_value
        largest = above

    top = tl.max(largest, 0)
    factor = tl.exp(largest - tl.maximum(top, LOWEST))
    place = head * PARTS + part
    tl.store(sums + place * HEAD_DIM + column, tl.sum(sum_of_values * factor[:, None], 0))
    tl.store(weights + place, top)
    tl.store(weights + heads * PARTS + place, tl.sum(total * factor, 0))


@triton.jit
def combine(
    sums,
    weights,
    out,
    heads,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The parts of one query head together."""
    begin(OVERLAP)
    wait_for_inputs(OVERLAP)
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
