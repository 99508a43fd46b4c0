"""One GEMM tile of ``dY^T X`` in fp32 registers, reduced against ``q - z`` per group before it is left.

Neither the dequantized weight nor the weight's gradient is ever stored: a program keeps ``[BLOCK_N, BLOCK_K]`` fp32
accumulators over all tokens, multiplies them by the centered codes of its tile and writes one value per output row
and group. A group longer than the tile gives one value per tile, which a second, fixed-order sum joins.
"""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["reduce_groups", "scale_grad_tile"]


@triton.jit
def scale_grad_tile(
    x,  # [tokens, in]: a pointer, or a tensor descriptor of blocks [BLOCK_T, BLOCK_K]
    dy,  # [tokens, out]: the same, blocks [BLOCK_T, BLOCK_N]
    qweight,  # int32 [words, out]
    qzeros,  # int32 [groups, zero words]
    partial,  # fp32 [rows, out]: one row a group, or a tile of a longer group
    tokens,
    in_features,
    out_features,
    zero_words,
    panel_tiles,  # tiles along the output features whose blocks of dy are reused from L2
    BITS: tl.constexpr,
    REACH: tl.constexpr,  # input features a row of ``partial`` covers: the group, or BLOCK_K within a longer one
    TILES_A_GROUP: tl.constexpr,  # 1 unless the group is longer than the tile
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EXACT: tl.constexpr,  # float32 products without TF32
):
    program = tl.program_id(0)
    tiles_n, tiles_k = tl.cdiv(out_features, BLOCK_N), tl.cdiv(in_features, BLOCK_K)
    panel = program // (panel_tiles * tiles_k)
    width = min(tiles_n - panel * panel_tiles, panel_tiles)
    within = program % (panel_tiles * tiles_k)
    tile_n, tile_k = panel * panel_tiles + within % width, within // width
    first_n, first_k = tile_n * BLOCK_N, tile_k * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if DESCRIPTORS:
        for t in range(0, tokens, BLOCK_T):
            left, right = dy.load([t, first_n]), x.load([t, first_k])
            acc = tl.dot(left.T, right, acc, input_precision="ieee" if EXACT else None)
    else:
        n = first_n + tl.arange(0, BLOCK_N)
        k = first_k + tl.arange(0, BLOCK_K)
        for t in range(0, tokens, BLOCK_T):
            row = (t + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
            here, in_n, in_k = row < tokens, (n < out_features)[None, :], (k < in_features)[None, :]
            left = tl.load(dy + row * out_features + n[None, :], mask=here & in_n, other=0)
            right = tl.load(x + row * in_features + k[None, :], mask=here & in_k, other=0)
            acc = tl.dot(left.T, right, acc, input_precision="ieee" if EXACT else None)

    reduce_groups(acc, qweight, qzeros, partial, first_n, tile_k, in_features, out_features, zero_words,
                   BITS, REACH, TILES_A_GROUP, BLOCK_N, BLOCK_K)  # fmt: skip


@triton.jit
def reduce_groups(
    acc,
    qweight,
    qzeros,
    partial,
    first_n,
    tile_k,
    in_features,
    out_features,
    zero_words,
    BITS: tl.constexpr,
    REACH: tl.constexpr,
    TILES_A_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes the sums over each group of ``acc`` (fp32 ``[BLOCK_N, BLOCK_K]`` of ``dY^T X``) times ``q - z``."""
    per_word: tl.constexpr = 32 // BITS
    ones: tl.constexpr = (1 << BITS) - 1
    rows_a_tile: tl.constexpr = BLOCK_K // REACH
    first_k = tile_k * BLOCK_K
    # [BLOCK_N, rows_a_tile, REACH] is how the accumulators already lie: a group is a run of a thread's own columns
    n = first_n + tl.arange(0, BLOCK_N)
    row = tl.arange(0, rows_a_tile)
    k = first_k + row[None, :, None] * REACH + tl.arange(0, REACH)[None, None, :]
    inside = (n < out_features)[:, None, None] & (k < in_features)
    at = qweight + (k // per_word).to(tl.int64) * out_features + n[:, None, None]
    codes = (tl.load(at, mask=inside, other=0) >> (k % per_word * BITS)) & ones

    kept = tile_k * rows_a_tile + row  # rows of ``partial``
    stored = (n < out_features)[:, None] & (first_k + row * REACH < in_features)[None, :]
    group = kept // TILES_A_GROUP
    zero_word = tl.load(qzeros + group[None, :] * zero_words + (n // per_word)[:, None], mask=stored, other=0)
    zeros = (zero_word >> ((n % per_word) * BITS)[:, None]) & ones
    centered = (codes - zeros[:, :, None]).to(tl.float32)
    sums = tl.sum(tl.reshape(acc, (BLOCK_N, rows_a_tile, REACH)) * centered, axis=2)
    tl.store(partial + kept[None, :].to(tl.int64) * out_features + n[:, None], sums, mask=stored)
