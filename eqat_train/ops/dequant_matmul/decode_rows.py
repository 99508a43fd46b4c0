"""The kernel for 2 to 16 rows of x: a column of the tensor core's tile is a row of x.

Units are counted group by group, so that each lies in one group; inputs of its words that belong to a neighbour are
read as zeros. A *piece* is some units of one group: their products with the codes are added up, and scales and
zero-points applied to the sums, ``s * (sum(q * x) - z * sum(x))``, in float32.

Warps are ``ACROSS`` x ``DEEP``: those across hold other output features, and read x through the same L1 cache; those
deep hold other units, and are added at the end in their order. A warp holds ``WIDE`` times 32 output features, for
which it reads x once.
"""

# ruff: noqa: N803, N806, PLR0912, PLR0915, RUF005 -- compile-time values are in capitals, and Triton compiles less than Python
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from ..overlap import begin, wait_for_inputs
from .inputs import STAGES, copies_done, inputs, meet, place, stage, staged
from .lanes import divide, floats, load1, load2_if, load4_if, store, stream4_if, thread_index, zero_points

__all__ = ["decode_rows_kernel"]


@triton.jit
def _below(unit: tl.constexpr, BITS: tl.constexpr):
    """Rows from those of a piece's first unit to those of another."""
    return unit // 4 * 16 + unit % 4 if BITS == 3 else unit * 4


@triton.jit
def _part(values, first: tl.constexpr, COUNT: tl.constexpr):
    """Some neighbours of a tuple."""
    part = ()
    for i in tl.static_range(COUNT):
        part = part + (values[first + i],)
    return part


@triton.jit
def _factors(scales, qzeros, n, live, BITS: tl.constexpr):
    """Registers of four neighbouring scales, zeros where not ``live``, and the words that hold their zero-points."""
    taken = ()
    if scales.dtype.element_ty == tl.float32:
        taken = load4_if(scales + n, live)
    else:
        taken = load2_if(scales + n, live)
    taken = taken + (load1(qzeros + divide(n, 32 // BITS)),)
    if 32 % BITS != 0:
        taken = taken + (load1(qzeros + divide(n + 3, 32 // BITS)),)
    return taken


@triton.jit
def _fetch(
    qweight, qzeros, scales, first, r, n, N, words, groups, zeros_stride, BITS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_UNITS: tl.constexpr, UNITS: tl.constexpr, PIECE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For each piece and each 32 output features its scales and words of zero-points, then its words."""
    PER_WORD: tl.constexpr = 32 // BITS
    loaded = ()
    for piece in tl.static_range(UNITS // PIECE):
        group, row = place(first + piece * PIECE, r, BITS, GROUP, GROUP_UNITS)
        live = group < groups
        end = tl.minimum((group + 1) * GROUP, words * PER_WORD)
        at = tl.where(live, group, 0).to(tl.int64)
        pointer = qweight + row.to(tl.int64) * N
        for wide in tl.static_range(WIDE):
            here = tl.minimum(n + wide * 32, N - 4)
            loaded = loaded + _factors(scales + at * N, qzeros + at * zeros_stride, here, live, BITS)
            for unit in tl.static_range(PIECE):
                inside = live & ((row + _below(unit, BITS)) * PER_WORD < end)
                loaded = loaded + stream4_if(pointer + _below(unit, BITS) * N + here, inside)
    return loaded


@triton.jit(do_not_specialize=["rows_x", "nothing"])
def decode_rows_kernel(
    x,  # 16-bit [rows_x, K]
    qweight,  # int32 [words, N]
    qzeros,  # int32 [groups, zeros_stride]
    scales,  # floating [groups, N]
    bias,  # [N] or None
    out,  # [rows_x, N]
    rows_x,
    K,
    N,
    words,
    groups,
    zeros_stride,
    nothing,  # 0
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    EXACT: tl.constexpr,  # a group is so many units and no input less
    UNPACK: tl.constexpr,
    UNPACK_OPERANDS: tl.constexpr,
    PAIR: tl.constexpr,
    PAIR_OPERANDS: tl.constexpr,
    SUM_INPUTS: tl.constexpr,
    SUM_INPUTS_OPERANDS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    MULTIPLY_OPERANDS: tl.constexpr,
    REGISTERS: tl.constexpr,  # that a word is unpacked to
    SUM: tl.constexpr,
    SUM_OPERANDS: tl.constexpr,
    SHARED: tl.constexpr,
    STAGED: tl.constexpr,  # inputs are read from shared memory
    TILES: tl.constexpr,  # of 8 columns
    UNITS: tl.constexpr,  # that a warp loads at once
    PIECE: tl.constexpr,
    STEPS: tl.constexpr,
    WIDE: tl.constexpr,
    ACROSS: tl.constexpr,
    DEEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    PAIRS: tl.constexpr = PER_WORD // 2
    # registers of a piece's scales, of its factors, and of all it loads for 32 output features
    SCALES: tl.constexpr = 4 if scales.dtype.element_ty == tl.float32 else 2
    FACTORS: tl.constexpr = SCALES + (2 if 32 % BITS else 1)
    EACH: tl.constexpr = FACTORS + 4 * PIECE
    # bytes: a unit's inputs, and those of a step
    SLICE: tl.constexpr = 8 * TILES * 4 * PER_WORD * 2
    STAGE: tl.constexpr = DEEP * UNITS * SLICE
    thread = thread_index(32 * ACROSS * DEEP)
    warp = thread >> 5
    lane = thread & 31
    r = lane & 3
    column = lane >> 2
    deep = divide(warp, ACROSS)
    across = warp - deep * ACROSS
    n = (tl.program_id(0) * ACROSS + across) * (32 * WIDE) + column * 4
    zero = (thread & 0).to(tl.float32)
    y = (zero,) * (8 * TILES * WIDE)
    first = deep * UNITS
    # weights are nobody's output: their loads need not wait for the kernels before
    begin(OVERLAP)
    loaded = _fetch(
        qweight, qzeros, scales, first, r, n, N, words, groups, zeros_stride, BITS, GROUP, GROUP_UNITS, UNITS, PIECE,
        WIDE,
    )  # fmt: skip
    wait_for_inputs(OVERLAP)
    room = tl.inline_asm_elementwise(SHARED, "=r,r", [thread], tl.int32, False, 1)
    helper = across * 32 + lane  # of those who copy the same inputs
    x_at = room + deep * (UNITS * SLICE)
    if STAGED:
        for ahead in tl.static_range(STAGES - 1):
            stage(
                x_at + ahead * STAGE, helper, x, first + ahead * DEEP * UNITS, rows_x, K, groups, BITS, GROUP,
                GROUP_UNITS, UNITS, TILES, ACROSS,
            )  # fmt: skip
    for step in range(STEPS):
        following = loaded
        if STEPS > 1:
            following = _fetch(
                qweight, qzeros, scales, first + DEEP * UNITS, r, n, N, words, groups, zeros_stride, BITS, GROUP,
                GROUP_UNITS, UNITS, PIECE, WIDE,
            )  # fmt: skip
        # nothing is 0, but the compiler cannot know: words that wait for all loads keep the loads in flight together
        wait = loaded[0]
        for part in tl.static_range(UNITS // PIECE * WIDE):
            for unit in tl.static_range(PIECE):
                wait = wait | loaded[part * EACH + FACTORS + 4 * unit]
        start = (wait & nothing).to(tl.float32, bitcast=True)
        if STAGED:
            meet(deep + 1, ACROSS)
            stage(
                x_at + (step + STAGES - 1) % STAGES * STAGE, helper, x, first + (STAGES - 1) * DEEP * UNITS, rows_x, K,
                groups, BITS, GROUP, GROUP_UNITS, UNITS, TILES, ACROSS,
            )  # fmt: skip
        here_x = x_at + step % STAGES * STAGE
        for piece in tl.static_range(UNITS // PIECE):
            group, row = place(first + piece * PIECE, r, BITS, GROUP, GROUP_UNITS)
            live = group < groups
            first_k = group * GROUP
            end = tl.where(live, tl.minimum(first_k + GROUP, K), 0)
            k = tl.where(live, row * PER_WORD, 0)
            # columns past the last row of x compute what is there and store nothing
            xs = ()
            sums = ()
            for tile in tl.static_range(TILES):
                x_row = x + tl.minimum(column + 8 * tile, rows_x - 1).to(tl.int64) * K
                total = (start,) * 4
                taken = ()
                for unit in tl.static_range(PIECE):
                    if BITS != 3 or unit % 4 == 0:
                        if STAGED:
                            taken = staged(here_x + (piece * PIECE + unit) * SLICE, column + 8 * tile, r, BITS)
                        elif BITS == 3:
                            taken = inputs(x_row, k + unit // 4 * 160, first_k, end, BITS, EXACT)
                        else:
                            taken = inputs(x_row, k + unit * 4 * PER_WORD, first_k, end, BITS, EXACT)
                    pair = _part(taken, unit % 4 * 5, 5) if BITS == 3 else taken
                    pair = tl.inline_asm_elementwise(PAIR, PAIR_OPERANDS, pair, (tl.int32,) * PAIRS, True, 1)
                    total = tl.inline_asm_elementwise(
                        SUM_INPUTS, SUM_INPUTS_OPERANDS, pair + total, (tl.float32,) * 4, True, 1
                    )
                    xs = xs + pair
                sums = sums + total
            new_y = ()
            for wide in tl.static_range(WIDE):
                mine = _part(loaded, (piece * WIDE + wide) * EACH, EACH)
                s = floats(mine, scales.dtype.element_ty)
                here = tl.minimum(n + wide * 32, N - 4)
                z = zero_points(mine[SCALES], mine[FACTORS - 1], here, BITS)
                acc = ()
                for tile in tl.static_range(TILES):
                    for i in tl.static_range(8):
                        acc = acc + (z[i // 2] * sums[4 * tile + i % 2] + sums[4 * tile + 2 + i % 2],)
                for unit in tl.static_range(PIECE):
                    four = _part(mine, FACTORS + 4 * unit, 4)
                    codes = tl.inline_asm_elementwise(
                        UNPACK, UNPACK_OPERANDS, four, (tl.int32,) * (4 * REGISTERS), True, 1
                    )
                    added = ()
                    for tile in tl.static_range(TILES):
                        operands = codes + _part(xs, (tile * PIECE + unit) * PAIRS, PAIRS) + _part(acc, 8 * tile, 8)
                        added = added + tl.inline_asm_elementwise(
                            MULTIPLY, MULTIPLY_OPERANDS, operands, (tl.float32,) * 8, True, 1
                        )
                    acc = added
                for i in tl.static_range(8 * TILES):
                    new_y = new_y + (y[8 * TILES * wide + i] + s[i % 8 // 2] * acc[i],)
            y = new_y
        first += DEEP * UNITS
        loaded = following
    # value v of a lane: tile v // 8, output feature v % 8 // 2, column 2 * r + v % 2
    COUNT: tl.constexpr = (8 * TILES + DEEP - 1) // DEEP
    if STAGED:
        copies_done(thread)
    for wide in tl.static_range(WIDE):
        values = _part(y, 8 * TILES * wide, 8 * TILES)
        if COUNT == 1:
            sums = (tl.inline_asm_elementwise(SUM, SUM_OPERANDS, values + (room,), tl.float32, False, 1),)
        else:
            sums = tl.inline_asm_elementwise(SUM, SUM_OPERANDS, values + (room,), (tl.float32,) * COUNT, False, 1)
        here = n + wide * 32
        for i in tl.static_range(COUNT):
            v = deep + i * DEEP
            m = (v & -8) + 2 * r + (v & 1)
            store(out, bias, sums[i], here + ((v & 7) >> 1), m, N, (here < N) & (v < 8 * TILES) & (m < rows_x))
