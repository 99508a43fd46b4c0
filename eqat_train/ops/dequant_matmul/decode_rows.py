"""The kernel for 2 to 16 rows of x: a column of the tensor core's tile is a row of x; weights are made in registers.

Warps are ``ACROSS`` x ``DEEP``: those across hold other output features, and read x through the same L1 cache; those
deep hold other parts of K, and are added at the end in their order.
"""

# ruff: noqa: N803, N806, PLR0912, PLR0915, RUF005 -- compile-time values are in capitals, and Triton compiles less than Python
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .lanes import divide, load1, load2, load4, store, stream4, thread_index

__all__ = ["decode_rows_kernel"]


@triton.jit
def _inputs(x, k, mask, end, BITS: tl.constexpr):
    """The inputs of a word, two a register."""
    if BITS == 3:
        a = load1(x + k, mask & (k < end))
        b = load1(x + k + 2, mask & (k + 2 < end))
        c = load1(x + k + 4, mask & (k + 4 < end))
        d = load1(x + k + 6, mask & (k + 6 < end))
        e = load1(x + k + 8, mask & (k + 8 < end))
        return (a, b, c, d, e)
    elif BITS == 2:
        return load4(x + k, mask) + load4(x + k + 8, mask)
    elif BITS == 4:
        return load4(x + k, mask)
    else:
        return load2(x + k, mask)


@triton.jit
def _scales(pointer, mask, SAME: tl.constexpr):
    """Four neighbouring scales: two registers as they are stored in the dtype of x, or else four in float32."""
    if SAME:
        return load2(pointer, mask)
    elif pointer.dtype.element_ty == tl.float32:
        a, b, c, d = load4(pointer, mask)
        return (
            a.to(tl.float32, bitcast=True),
            b.to(tl.float32, bitcast=True),
            c.to(tl.float32, bitcast=True),
            d.to(tl.float32, bitcast=True),
        )
    else:
        a = tl.load(pointer, mask=mask, other=0).to(tl.float32)
        b = tl.load(pointer + 1, mask=mask, other=0).to(tl.float32)
        c = tl.load(pointer + 2, mask=mask, other=0).to(tl.float32)
        d = tl.load(pointer + 3, mask=mask, other=0).to(tl.float32)
        return (a, b, c, d)


@triton.jit
def _zero_words(row, n, mask, BITS: tl.constexpr):
    """The word, or two where fields do not end with a word, that hold four neighbouring zero-points."""
    first = load1(row + divide(n, 32 // BITS), mask)
    if 32 % BITS == 0:
        return (first,)
    else:
        return (first, load1(row + divide(n + 3, 32 // BITS), mask))


@triton.jit
def _turn(field, BITS: tl.constexpr):
    """The bit of a field of this word or, past its end, of the next."""
    return tl.where(field < 32 // BITS, field, field - 32 // BITS) * BITS


@triton.jit
def _zeros(first, second, n, BITS: tl.constexpr):
    """Four neighbouring zero-points; ``n`` is a multiple of 4."""
    PER_WORD: tl.constexpr = 32 // BITS
    ONES: tl.constexpr = (1 << BITS) - 1
    field = n - divide(n, PER_WORD) * PER_WORD
    a = first >> (field * BITS)
    if 32 % BITS == 0:
        b = a >> BITS
        c = a >> (2 * BITS)
        d = a >> (3 * BITS)
    else:
        b = tl.where(field + 1 < PER_WORD, first, second) >> _turn(field + 1, BITS)
        c = tl.where(field + 2 < PER_WORD, first, second) >> _turn(field + 2, BITS)
        d = tl.where(field + 3 < PER_WORD, first, second) >> _turn(field + 3, BITS)
    return (a & ONES, b & ONES, c & ONES, d & ONES)


@triton.jit
def _fetch(
    qweight, qzeros, scales, first_row, r, n, live, N, words, groups, zeros_stride, BITS: tl.constexpr,
    GROUP: tl.constexpr, UNITS: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """For each unit its four words, then for each group that a word may have its scales and words of zero-points."""
    PER_WORD: tl.constexpr = 32 // BITS
    pointer = qweight + (first_row + r).to(tl.int64) * N + n
    loaded = ()
    for unit in tl.static_range(UNITS):
        row = first_row + unit * 4 + r
        inside = live & (row < words)
        loaded = loaded + stream4(pointer + unit * 4 * N, inside)
        group = divide(row * PER_WORD, GROUP)
        loaded = loaded + _scales(scales + group.to(tl.int64) * N + n, inside, SAME)
        loaded = loaded + _zero_words(qzeros + group.to(tl.int64) * zeros_stride, n, inside, BITS)
        if BITS == 3:
            last = tl.minimum(divide(row * PER_WORD + PER_WORD - 1, GROUP), groups - 1)
            loaded = loaded + _scales(scales + last.to(tl.int64) * N + n, inside, SAME)
            loaded = loaded + _zero_words(qzeros + last.to(tl.int64) * zeros_stride, n, inside, BITS)
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
    WEIGHTS: tl.constexpr,
    WEIGHTS_OPERANDS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    MULTIPLY_OPERANDS: tl.constexpr,
    SUM: tl.constexpr,
    SUM_OPERANDS: tl.constexpr,
    SHARED: tl.constexpr,
    TILES: tl.constexpr,  # of 8 columns
    UNITS: tl.constexpr,  # that a warp loads at once
    STEPS: tl.constexpr,
    ACROSS: tl.constexpr,
    DEEP: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    PAIRS: tl.constexpr = PER_WORD // 2
    SAME: tl.constexpr = scales.dtype.element_ty == x.dtype.element_ty
    thread = thread_index(32 * ACROSS * DEEP)
    warp = thread >> 5
    lane = thread & 31
    r = lane & 3
    column = lane >> 2
    deep = divide(warp, ACROSS)
    across = warp - deep * ACROSS
    n = (tl.program_id(0) * ACROSS + across) * 32 + column * 4
    live = n < N
    x_row = x + column.to(tl.int64) * K
    zero = (thread & 0).to(tl.float32)
    y = (zero,) * (8 * TILES)
    # registers of a group's scales and words of zero-points, and of a unit
    FACTORS: tl.constexpr = 2 if SAME else 4
    GROUPS: tl.constexpr = 2 if BITS == 3 else 1
    EACH: tl.constexpr = FACTORS + (2 if 32 % BITS else 1)
    UNIT: tl.constexpr = 4 + GROUPS * EACH
    first_row = deep * (4 * UNITS)
    loaded = _fetch(
        qweight, qzeros, scales, first_row, r, n, live, N, words, groups, zeros_stride, BITS, GROUP, UNITS, SAME
    )
    for _step in range(STEPS):
        following = loaded
        if STEPS > 1:
            next_row = first_row + DEEP * 4 * UNITS
            following = _fetch(
                qweight, qzeros, scales, next_row, r, n, live, N, words, groups, zeros_stride, BITS, GROUP, UNITS, SAME
            )
        # nothing is 0, but the compiler cannot know: words that wait for all loads keep the loads in flight together
        wait = loaded[0]
        for unit in tl.static_range(UNITS):
            wait = wait | loaded[unit * UNIT] | loaded[unit * UNIT + UNIT - 1]
        wait = wait & nothing
        for unit in tl.static_range(UNITS):
            row = first_row + unit * 4 + r
            k = row * PER_WORD
            operands = ()
            for i in tl.static_range(4):
                operands = operands + (loaded[unit * UNIT + i] | wait,)
            for g in tl.static_range(GROUPS):
                for i in tl.static_range(FACTORS):
                    operands = operands + (loaded[unit * UNIT + 4 + g * EACH + i],)
            for g in tl.static_range(GROUPS):
                first = loaded[unit * UNIT + 4 + g * EACH + FACTORS]
                operands = operands + _zeros(first, loaded[unit * UNIT + 3 + (g + 1) * EACH], n, BITS)
            if BITS == 3:
                # where the word's second group starts
                border = (divide(k, GROUP) + 1) * GROUP - k
                for j in tl.static_range(PAIRS):
                    high = tl.where(border > j + PAIRS, 0x3200, 0x7600)
                    operands = operands + (high | tl.where(border > j, 0x10, 0x54),)
            weight = tl.inline_asm_elementwise(WEIGHTS, WEIGHTS_OPERANDS, operands, (tl.int32,) * (4 * PAIRS), True, 1)
            new_y = ()
            for tile in tl.static_range(TILES):
                inside = (column + 8 * tile < rows_x) & (row < words)
                xs = _inputs(x_row + tile * 8 * K, k, inside, K, BITS)
                old = ()
                for i in tl.static_range(8):
                    old = old + (y[8 * tile + i],)
                new_y = new_y + tl.inline_asm_elementwise(
                    MULTIPLY, MULTIPLY_OPERANDS, weight + xs + old, (tl.float32,) * 8, True, 1
                )
            y = new_y
        first_row += DEEP * 4 * UNITS
        loaded = following
    # value v of a lane: tile v // 8, output feature v % 8 // 2, column 2 * r + v % 2
    COUNT: tl.constexpr = (8 * TILES + DEEP - 1) // DEEP
    shared = tl.inline_asm_elementwise(SHARED, "=r,r", [thread], tl.int32, False, 1)
    if COUNT == 1:
        sums = (tl.inline_asm_elementwise(SUM, SUM_OPERANDS, y + (shared,), tl.float32, False, 1),)
    else:
        sums = tl.inline_asm_elementwise(SUM, SUM_OPERANDS, y + (shared,), (tl.float32,) * COUNT, False, 1)
    for i in tl.static_range(COUNT):
        v = deep + i * DEEP
        m = (v & -8) + 2 * r + (v & 1)
        store(out, bias, sums[i], n + ((v & 7) >> 1), m, N, live & (v < 8 * TILES) & (m < rows_x))
