"""The kernel for one row of x: the columns of the tensor core's tile are parts of K, each with its own scales.

A column holds the row's inputs of one unit and zeros elsewhere, so one product adds up to 8 units apart; where a unit
has inputs of several groups, a column is a group. Scales and zero-points are applied to the sums,
``s * (sum(q * x) - z * sum(x))``, in float32. A *block* is as many units as fill the columns. Scales, zero-points and x
go to shared memory by copies that run on while words are loaded.
"""

# ruff: noqa: N803, N806, PLR0912, PLR0915, RUF005 -- compile-time values are in capitals, and Triton compiles less than Python
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from ..overlap import begin, wait_for_inputs
from .lanes import COPY_UP_TO_16, divide, floats, store, stream4_if, thread_index, zero_points

__all__ = ["decode_row_kernel"]

COPY16: tl.constexpr = tl.constexpr("cp.async.cg.shared.global [$1], [$2], 16, $3; mov.b32 $0, 0;")
COPY8: tl.constexpr = tl.constexpr("cp.async.ca.shared.global [$1], [$2], 8, $3; mov.b32 $0, 0;")
COPY4: tl.constexpr = tl.constexpr("cp.async.ca.shared.global [$1], [$2], 4, $3; mov.b32 $0, 0;")
# in both the operand is never 1, but that is not known: the wait comes after what the operand depends on
WAIT_ALL: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $1, 1;
@p cp.async.wait_all;
bar.warp.sync 0xffffffff;
mov.b32 $0, $1;
}""")
WAIT_BUT_ONE: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $1, 1;
@p cp.async.wait_group 1;
bar.warp.sync 0xffffffff;
mov.b32 $0, $1;
}""")
COMMIT: tl.constexpr = tl.constexpr("cp.async.commit_group; mov.b32 $0, $1;")
MEET: tl.constexpr = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
TAKE4: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $5, 0;
mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
@p ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];
}""")
TAKE2: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $3, 0;
mov.b32 $0, 0; mov.b32 $1, 0;
@p ld.shared.v2.b32 {$0, $1}, [$2];
}""")
TAKE1: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $2, 0;
mov.b32 $0, 0;
@p ld.shared.b32 $0, [$1];
}""")
SWAP1: tl.constexpr = tl.constexpr("{.reg .b32 t; shfl.sync.bfly.b32 t, $2, 1, 31, 0xffffffff; add.f32 $0, $1, t;}")
SWAP2: tl.constexpr = tl.constexpr("{.reg .b32 t; shfl.sync.bfly.b32 t, $2, 2, 31, 0xffffffff; add.f32 $0, $1, t;}")


@triton.jit
def _copy(to, pointer, mask, SIZE: tl.constexpr):
    """Starts a copy of SIZE bytes a thread to a shared address, of zeros where masked."""
    COPY: tl.constexpr = COPY16 if SIZE == 16 else (COPY8 if SIZE == 8 else COPY4)
    tl.inline_asm_elementwise(COPY, "=r,r,l,r", [to, pointer, mask.to(tl.int32) * SIZE], tl.int32, False, 1)


@triton.jit
def _take4(at, mask):
    return tl.inline_asm_elementwise(TAKE4, "=&r,=&r,=&r,=&r,r,r", [at, mask.to(tl.int32)], (tl.int32,) * 4, False, 1)


@triton.jit
def _take2(at, mask):
    return tl.inline_asm_elementwise(TAKE2, "=&r,=&r,r,r", [at, mask.to(tl.int32)], (tl.int32,) * 2, False, 1)


@triton.jit
def _take1(at, mask):
    return tl.inline_asm_elementwise(TAKE1, "=&r,r,r", [at, mask.to(tl.int32)], tl.int32, False, 1)


@triton.jit
def _scales(at, DTYPE: tl.constexpr):
    """Four neighbouring scales in float32."""
    always = (at & 0) == 0
    if DTYPE == tl.float32:
        return floats(_take4(at, always), DTYPE)
    else:
        return floats(_take2(at, always), DTYPE)


@triton.jit
def _zeros(at, next_word, n, BITS: tl.constexpr):
    """Four neighbouring zero-points in float32."""
    always = (at & 0) == 0
    first = _take1(at, always)
    second = first
    if 32 % BITS != 0:
        second = _take1(at + next_word, always)
    return zero_points(first, second, n, BITS)


@triton.jit
def _inputs(at, live, BITS: tl.constexpr):
    """The inputs of a word from shared memory, two a register, zero where not ``live``: at 3 bits a mask a pair."""
    if BITS == 3:
        a = _take1(at, live[0])
        b = _take1(at + 4, live[1])
        c = _take1(at + 8, live[2])
        d = _take1(at + 12, live[3])
        e = _take1(at + 16, live[4])
        return (a, b, c, d, e)
    elif BITS == 2:
        return _take4(at, live[0]) + _take4(at + 16, live[0])
    elif BITS == 4:
        return _take4(at, live[0])
    else:
        return _take2(at, live[0])


@triton.jit
def _in_group(k, group, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Whether inputs from ``k`` on are of a group, as :func:`_inputs` takes it; groups part at an even ``k``."""
    live = (divide(k, GROUP) == group,)
    if BITS == 3:
        for j in tl.static_range(1, 5):
            live = live + (divide(k + 2 * j, GROUP) == group,)
    return live


@triton.jit
def _halve(a, b, lane, BIT: tl.constexpr):
    """``a`` and its neighbour's on lanes where the bit is clear, ``b`` and its neighbour's on the others, added."""
    low = (lane & BIT) == 0
    SWAP: tl.constexpr = SWAP2 if BIT == 2 else SWAP1
    return tl.inline_asm_elementwise(SWAP, "=f,f,f", [tl.where(low, a, b), tl.where(low, b, a)], tl.float32, True, 1)


@triton.jit
def _words(qweight, row, n, N, words, UNITS: tl.constexpr):
    """Four words of each unit, all in flight; past the last row anything, for inputs are zeros there."""
    pointer = qweight + row.to(tl.int64) * N + n
    loaded = ()
    for unit in tl.static_range(UNITS):
        loaded = loaded + stream4_if(pointer + unit * 4 * N, row + unit * 4 < words)
    return loaded


@triton.jit
def _fetch_factors(
    to, thread, qzeros, scales, first_row, r, n, N, words, groups, zeros_stride, BITS: tl.constexpr,
    GROUP: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, THREADS: tl.constexpr,
    SCALE: tl.constexpr, ZEROS: tl.constexpr, SETS: tl.constexpr,
):  # fmt: skip
    """Starts the copies of a step's scales and zero-points, of each column of its blocks."""
    PER_WORD: tl.constexpr = 32 // BITS
    scales_to = to + thread * SCALE
    zeros_to = to + SETS * THREADS * SCALE + thread * 4
    for block in tl.static_range(UNITS // BLOCK):
        block_row = first_row + block * 4 * BLOCK
        for c in tl.static_range(2):
            if SPREAD:
                row = block_row + 4 * (2 * r + c)
                group = divide(row * PER_WORD, GROUP)
                live = (row < words) & (2 * r + c < BLOCK)
            else:
                group = divide(block_row * PER_WORD, GROUP) + 2 * r + c
                live = (block_row < words) & (group < groups)
            _copy(scales_to + (2 * block + c) * THREADS * SCALE, scales + group.to(tl.int64) * N + n, live, SCALE)
            zeros_row = qzeros + group.to(tl.int64) * zeros_stride
            zero_to = zeros_to + (2 * block + c) * THREADS * ZEROS
            _copy(zero_to, zeros_row + divide(n, PER_WORD), live, 4)
            if ZEROS == 8:
                _copy(zero_to + THREADS * 4, zeros_row + divide(n + 3, PER_WORD), live, 4)


@triton.jit
def _fetch_x(to, thread, x, first_row, K, PER_WORD: tl.constexpr, CHUNK: tl.constexpr):
    """Starts the copies of a warp's inputs for a step, which ends the step's copies."""
    first_k = first_row * PER_WORD
    for i in tl.static_range((CHUNK + 511) // 512):
        at = (thread & 31) * 16 + i * 512
        left = (K - first_k) * 2 - at
        # a lane past the chunk must not write either
        tl.inline_asm_elementwise(
            COPY_UP_TO_16,
            "=r,r,l,r,r",
            [to + at, x + first_k + (at >> 1), tl.minimum(tl.maximum(left, 0), 16), (at < CHUNK).to(tl.int32)],
            tl.int32,
            False,
            1,
        )
    tl.inline_asm_elementwise(COMMIT, "=r,r", [thread], tl.int32, False, 1)


@triton.jit
def decode_row_kernel(
    x,  # 16-bit [K]
    qweight,  # int32 [words, N]
    qzeros,  # int32 [groups, zeros_stride]
    scales,  # floating [groups, N]
    bias,  # [N] or None
    out,  # [N]
    K,
    N,
    words,
    groups,
    zeros_stride,
    nothing,  # 0
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    UNPACK: tl.constexpr,
    UNPACK_OPERANDS: tl.constexpr,
    PAIR: tl.constexpr,
    PAIR_OPERANDS: tl.constexpr,
    SUM_INPUTS: tl.constexpr,
    SUM_INPUTS_OPERANDS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    MULTIPLY_OPERANDS: tl.constexpr,
    CHAINS: tl.constexpr,  # of products that do not wait for each other
    REGISTERS: tl.constexpr,  # that a word is unpacked to
    SUM: tl.constexpr,
    SUM_OPERANDS: tl.constexpr,
    SHARED: tl.constexpr,
    SPREAD: tl.constexpr,  # columns are units, not groups
    BLOCK: tl.constexpr,  # units that fill the columns
    UNITS: tl.constexpr,  # that a warp loads at once
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    PAIRS: tl.constexpr = PER_WORD // 2
    SPAN: tl.constexpr = 4 * PER_WORD * BLOCK  # input features a block
    THREADS: tl.constexpr = 32 * WARPS
    # bytes: a thread's four scales, words of zero-points, and what a warp needs of x
    SCALE: tl.constexpr = 4 * scales.dtype.element_ty.primitive_bitwidth // 8
    ZEROS: tl.constexpr = 4 if 32 % BITS == 0 else 8
    SETS: tl.constexpr = UNITS // BLOCK * 2
    CHUNK: tl.constexpr = UNITS * 4 * PER_WORD * 2
    STAGE: tl.constexpr = SETS * THREADS * (SCALE + ZEROS) + WARPS * CHUNK
    thread = thread_index(THREADS)
    warp = thread >> 5
    lane = thread & 31
    r = lane & 3
    column = lane >> 2
    base = tl.program_id(0) * 32
    n = base + column * 4
    zero = (thread & 0).to(tl.float32)
    y = (zero, zero, zero, zero, zero, zero, zero, zero)
    shared = tl.inline_asm_elementwise(SHARED, "=r,r", [thread], tl.int32, False, 1)
    first_row = warp * (4 * UNITS)
    # weights are nobody's output: their loads need not wait for the kernels before
    begin(OVERLAP)
    loaded = _words(qweight, first_row + r, n, N, words, UNITS)
    _fetch_factors(
        shared, thread, qzeros, scales, first_row, r, n, N, words, groups, zeros_stride, BITS, GROUP, SPREAD, BLOCK,
        UNITS, THREADS, SCALE, ZEROS, SETS,
    )  # fmt: skip
    wait_for_inputs(OVERLAP)
    x_to = shared + SETS * THREADS * (SCALE + ZEROS) + warp * CHUNK
    _fetch_x(x_to, thread, x, first_row, K, PER_WORD, CHUNK)
    for step in range(STEPS):
        here = shared + (step & 1) * STAGE
        following = loaded
        if STEPS > 1:
            next_row = first_row + WARPS * 4 * UNITS
            there = STAGE - (step & 1) * STAGE
            following = _words(qweight, next_row + r, n, N, words, UNITS)
            _fetch_factors(
                shared + there, thread, qzeros, scales, next_row, r, n, N, words, groups, zeros_stride, BITS, GROUP,
                SPREAD, BLOCK, UNITS, THREADS, SCALE, ZEROS, SETS,
            )  # fmt: skip
            _fetch_x(x_to + there, thread, x, next_row, K, PER_WORD, CHUNK)
        scales_at = here + thread * SCALE
        zeros_at = here + SETS * THREADS * SCALE + thread * 4
        x_at = x_to + (step & 1) * STAGE
        first_k = first_row * PER_WORD
        # nothing is 0, but the compiler cannot know: sums that wait for all words keep the loads in flight together
        wait = loaded[0]
        for unit in tl.static_range(1, UNITS):
            wait = wait | loaded[4 * unit]
        start = (wait & nothing).to(tl.float32, bitcast=True)
        WAIT: tl.constexpr = WAIT_ALL if STEPS == 1 else WAIT_BUT_ONE
        tl.inline_asm_elementwise(WAIT, "=r,r", [wait & nothing], tl.int32, False, 1)
        for block in tl.static_range(UNITS // BLOCK):
            acc = (start,) * (8 * CHAINS)
            sums = (start,) * 4
            mine = (r,) * PAIRS
            if SPREAD:
                row = (block * BLOCK + column) * 4 + r
                mine = _inputs(x_at + row * PER_WORD * 2, (column < BLOCK,), BITS)
                mine = tl.inline_asm_elementwise(PAIR, PAIR_OPERANDS, mine, (tl.int32,) * PAIRS, True, 1)
                sums = tl.inline_asm_elementwise(
                    SUM_INPUTS, SUM_INPUTS_OPERANDS, mine + sums, (tl.float32,) * 4, True, 1
                )
            for unit in tl.static_range(BLOCK):
                xs = ()
                if SPREAD:
                    for j in tl.static_range(PAIRS):
                        xs = xs + (tl.where(column == unit, mine[j], 0),)
                else:
                    row = (block * BLOCK + unit) * 4 + r
                    group = divide(first_k + block * SPAN, GROUP) + column
                    live = _in_group(first_k + row * PER_WORD, group, GROUP, BITS)
                    xs = _inputs(x_at + row * PER_WORD * 2, live, BITS)
                    xs = tl.inline_asm_elementwise(PAIR, PAIR_OPERANDS, xs, (tl.int32,) * PAIRS, True, 1)
                    sums = tl.inline_asm_elementwise(
                        SUM_INPUTS, SUM_INPUTS_OPERANDS, xs + sums, (tl.float32,) * 4, True, 1
                    )
                four = ()
                for i in tl.static_range(4):
                    four = four + (loaded[4 * (block * BLOCK + unit) + i],)
                codes = tl.inline_asm_elementwise(UNPACK, UNPACK_OPERANDS, four, (tl.int32,) * (4 * REGISTERS), True, 1)
                acc = tl.inline_asm_elementwise(
                    MULTIPLY, MULTIPLY_OPERANDS, codes + xs + acc, (tl.float32,) * (8 * CHAINS), True, 1
                )
            new_y = ()
            for c in tl.static_range(2):
                s = _scales(scales_at + (2 * block + c) * THREADS * SCALE, scales.dtype.element_ty)
                z = _zeros(zeros_at + (2 * block + c) * THREADS * ZEROS, THREADS * 4, n, BITS)
                for t in tl.static_range(4):
                    total = sums[2 + c] + z[t] * sums[c]
                    for i in tl.static_range(CHAINS):
                        total += acc[8 * i + 2 * t + c]
                    new_y = new_y + (y[c * 4 + t] + s[t] * total,)
            y = new_y
        first_row += WARPS * 4 * UNITS
        loaded = following
        tl.inline_asm_elementwise(MEET, "=r,r", [thread], tl.int32, False, 1)
    # lane 4 * column + t gets output feature t, added over the four lanes of the column
    a = _halve(y[0] + y[4], y[2] + y[6], lane, 2)
    b = _halve(y[1] + y[5], y[3] + y[7], lane, 2)
    total = tl.inline_asm_elementwise(SUM, SUM_OPERANDS, [_halve(a, b, lane, 1), shared], tl.float32, False, 1)
    store(out, bias, total, base + lane, warp * 0, N, warp == 0)
