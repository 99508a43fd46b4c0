"""Dequantization straight from the packed words, zero-points and scales, in one kernel.

A program unpacks a tile of words, whose rows are neighbours in memory along the output features, and writes the
tile's weights along the input features. Every element is ``float32(q - z) * s``, rounded once: the reference's numbers.
"""

# ruff: noqa: N803, N806, PLR1714 -- compile-time values are in capitals, and Triton compiles less than Python
# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dequant_kernel"]


@triton.jit
def _zeros(qzeros, group, n, stride, mask, BITS: tl.constexpr):
    """Zero-points of a group and output feature, int32."""
    PER_WORD: tl.constexpr = 32 // BITS
    word = tl.load(qzeros + group.to(tl.int64) * stride + n // PER_WORD, mask=mask, other=0)
    return (word >> (n % PER_WORD * BITS)) & ((1 << BITS) - 1)


@triton.jit
def dequant_kernel(
    qweight,  # int32 [words, N]
    qzeros,  # int32 [groups, ceil(N / per word)]
    scales,  # floating [groups, N]
    g_idx,  # int32 [K] or None
    weight,  # floating [rows, K]
    first,
    rows,
    columns,
    N,
    zeros_stride,
    width,
    BITS: tl.constexpr,
    GROUPING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    RUNS: tl.constexpr = BLOCK_K // RUN
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(0) * BLOCK_K
    run = start + tl.arange(0, RUNS) * RUN
    n = (first + row)[:, None]
    inside = (row < rows)[:, None] & (run < columns)[None, :]
    # a run lies in two words at the most: 8 codes of 8 bits fill two, 8 of 3 bits are fewer than the 10 of a word
    low = run // PER_WORD
    words = tl.load(qweight + low.to(tl.int64)[None, :] * N + n, mask=inside, other=0)[:, :, None]
    k = run[:, None] + tl.arange(0, RUN)[None, :]  # [RUNS, RUN]
    if PER_WORD % RUN != 0:
        last = tl.minimum(run + RUN - 1, columns - 1) // PER_WORD
        more = tl.load(qweight + last.to(tl.int64)[None, :] * N + n, mask=inside, other=0)[:, :, None]
        words = tl.where((k // PER_WORD == low[:, None])[None, :, :], words, more)
    codes = (words >> (k % PER_WORD * BITS)[None, :, :]) & ((1 << BITS) - 1)  # [BLOCK_N, RUNS, RUN]
    if GROUPING == "tile" or GROUPING == "run":
        if GROUPING == "tile":
            group = (tl.arange(0, 1) + start // width)[None, :]
            mask = (row < rows)[:, None]
        else:
            group = (run // width)[None, :]
            mask = inside
        z = _zeros(qzeros, group, n, zeros_stride, mask, BITS)[:, :, None]
        s = tl.load(scales + group.to(tl.int64) * N + n, mask=mask, other=0).to(tl.float32)[:, :, None]
    else:
        if GROUPING == "each":
            group = k // width
        else:
            group = tl.load(g_idx + k, mask=k < columns, other=0)
        mask = (row < rows)[:, None, None] & (k < columns)[None, :, :]
        z = _zeros(qzeros, group[None, :, :], n[:, :, None], zeros_stride, mask, BITS)
        s = tl.load(scales + group.to(tl.int64)[None, :, :] * N + n[:, :, None], mask=mask, other=0).to(tl.float32)
    # codes in the mantissa of 2**23, less 2**23 + z: exact, and cheaper than a conversion
    centered = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (z.to(tl.float32) + 8388608.0)
    values = tl.reshape((centered * s).to(weight.dtype.element_ty), [BLOCK_N, BLOCK_K])
    at = start + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (at < columns)[None, :]
    tl.store(weight + row.to(tl.int64)[:, None] * columns + at[None, :], values, mask=mask)
