"""Inputs of the kernel for 2 to 16 rows of x, as the lanes of a warp take them: from x itself, or from shared memory.

Warps that hold different output features of the same units share those units' inputs: together they copy them to
shared memory, ``STAGES - 1`` steps before they are used. Inputs of another group are zeros.
"""

# ruff: noqa: N803, N806, PLR0911 -- compile-time values are in capitals, and Triton compiles less than Python
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .lanes import COPY_UP_TO_16, divide, load2, load2_if, load4, load4_if

__all__ = ["STAGES", "copies_done", "inputs", "meet", "place", "stage", "staged", "staged_bytes"]

STAGES: tl.constexpr = tl.constexpr(3)  # steps whose inputs shared memory holds
COMMIT: tl.constexpr = tl.constexpr("cp.async.commit_group; mov.b32 $0, 0;")
WAIT_BUT_ONE: tl.constexpr = tl.constexpr("cp.async.wait_group 1; mov.b32 $0, 0;")
WAIT_ALL: tl.constexpr = tl.constexpr("cp.async.wait_all; mov.b32 $0, 0;")
MEET_2: tl.constexpr = tl.constexpr("bar.sync $1, 64; mov.b32 $0, 0;")
MEET_4: tl.constexpr = tl.constexpr("bar.sync $1, 128; mov.b32 $0, 0;")
MEET_8: tl.constexpr = tl.constexpr("bar.sync $1, 256; mov.b32 $0, 0;")
TAKE4: tl.constexpr = tl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
TAKE2: tl.constexpr = tl.constexpr("ld.shared.v2.b32 {$0, $1}, [$2];")


def staged_bytes(bits: int, tiles: int, units: int) -> int:
    """Bytes of shared memory for the inputs of so many units a step and tiles of 8 rows."""
    return int(STAGES.value) * units * 8 * tiles * 4 * (32 // bits) * 2


@triton.jit
def place(unit, r, BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_UNITS: tl.constexpr):
    """The group of a unit, and the lane's row of words in it. At 3 bits four units: the lane's rows are neighbours."""
    PER_WORD: tl.constexpr = 32 // BITS
    group = divide(unit, GROUP_UNITS)
    if BITS == 3:
        first = divide(group * GROUP, 40) * 4
        return group, first + (unit - group * GROUP_UNITS) * 4 + r * 4
    else:
        return group, group * (GROUP // PER_WORD) + (unit - group * GROUP_UNITS) * 4 + r


@triton.jit
def inputs(x, k, first, end, BITS: tl.constexpr, EXACT: tl.constexpr):
    """The inputs of a word, two a register, zero before ``first`` and from ``end`` on; at 3 bits of four words."""
    if BITS == 3:
        # 40 inputs from a multiple of 40; groups part at multiples of 8
        taken = ()
        for i in tl.static_range(5):
            at = k + 8 * i
            taken = taken + load4_if(x + at, (at >= first) & (at < end))
        return taken
    elif EXACT:
        if BITS == 2:
            return load4(x + k) + load4(x + k + 8)
        elif BITS == 4:
            return load4(x + k)
        else:
            return load2(x + k)
    else:
        live = (k >= first) & (k < end)
        if BITS == 2:
            return load4_if(x + k, live) + load4_if(x + k + 8, live)
        elif BITS == 4:
            return load4_if(x + k, live)
        else:
            return load2_if(x + k, live)


@triton.jit
def stage(
    to, helper, x, first, rows_x, K, groups, BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_UNITS: tl.constexpr,
    UNITS: tl.constexpr, TILES: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Starts the copies of a step's inputs, row by row; ``helper`` is one of ``32 * ACROSS`` threads."""
    TOGETHER: tl.constexpr = 4 if BITS == 3 else 1  # units whose inputs lie side by side
    CHUNKS: tl.constexpr = TOGETHER * 4 * (32 // BITS) // 8  # of 16 bytes, a row
    for part in tl.static_range(UNITS // TOGETHER):
        group, row = place(first + part * TOGETHER, 0, BITS, GROUP, GROUP_UNITS)
        end = tl.where(group < groups, tl.minimum((group + 1) * GROUP, K), 0)
        for i in tl.static_range((8 * TILES * CHUNKS + 32 * ACROSS - 1) // (32 * ACROSS)):
            index = i * 32 * ACROSS + helper
            m = divide(index, CHUNKS)
            chunk = index - m * CHUNKS
            k = row * (32 // BITS) + chunk * 8
            given = (k >= group * GROUP) & (k < end)
            source = x + tl.minimum(m, rows_x - 1).to(tl.int64) * K + tl.where(given, k, 0)
            if BITS == 2:
                chunk = chunk ^ (m & 1)  # so that lanes read from different banks
            target = to + (part * 8 * TILES * CHUNKS + m * CHUNKS + chunk) * 16
            operands = [target, source, given.to(tl.int32) * 16, (m < 8 * TILES).to(tl.int32)]
            tl.inline_asm_elementwise(COPY_UP_TO_16, "=r,r,l,r,r", operands, tl.int32, False, 1)
    tl.inline_asm_elementwise(COMMIT, "=r,r", [helper], tl.int32, False, 1)


@triton.jit
def meet(barrier, ACROSS: tl.constexpr):
    """Waits until every helper's copies for a step are there, and all are done with the step before."""
    tl.inline_asm_elementwise(WAIT_BUT_ONE, "=r,r", [barrier], tl.int32, False, 1)
    if ACROSS == 2:
        tl.inline_asm_elementwise(MEET_2, "=r,r", [barrier], tl.int32, False, 1)
    elif ACROSS == 4:
        tl.inline_asm_elementwise(MEET_4, "=r,r", [barrier], tl.int32, False, 1)
    else:
        tl.inline_asm_elementwise(MEET_8, "=r,r", [barrier], tl.int32, False, 1)


@triton.jit
def copies_done(thread):
    """Waits for all copies of a thread."""
    tl.inline_asm_elementwise(WAIT_ALL, "=r,r", [thread], tl.int32, False, 1)


@triton.jit
def staged(at, m, r, BITS: tl.constexpr):
    """As :func:`inputs`, of row ``m`` from where :func:`stage` put a unit's, or at 3 bits four units', inputs."""
    if BITS == 2:
        first = at + m * 128
        return _take4(first + ((2 * r) ^ (m & 1)) * 16) + _take4(first + ((2 * r + 1) ^ (m & 1)) * 16)
    elif BITS == 3:
        taken = ()
        for i in tl.static_range(5):
            taken = taken + _take4(at + m * 320 + r * 80 + i * 16)
        return taken
    elif BITS == 4:
        return _take4(at + m * 64 + r * 16)
    else:
        return tl.inline_asm_elementwise(TAKE2, "=r,=r,r", [at + m * 32 + r * 8], (tl.int32,) * 2, False, 1)


@triton.jit
def _take4(at):
    return tl.inline_asm_elementwise(TAKE4, "=r,=r,=r,=r,r", [at], (tl.int32,) * 4, False, 1)
