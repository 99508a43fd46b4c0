"""What a thread does by itself: indices, loads of 4 to 16 bytes, scales and zero-points, stores.

One tensor element is one thread. Loads stay in the order in which they are written, among each other and beside waits
for other kernels.
"""

# ruff: noqa: N803, N806 -- compile-time values are in capitals, and Triton compiles less than Python
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "COPY_UP_TO_16",
    "divide",
    "floats",
    "load1",
    "load2",
    "load2_if",
    "load4",
    "load4_if",
    "store",
    "stream4_if",
    "thread_index",
    "zero_points",
]

THREAD: tl.constexpr = tl.constexpr("mov.u32 $0, %tid.x;")
LOAD4: tl.constexpr = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
LOAD2: tl.constexpr = tl.constexpr("ld.global.v2.b32 {$0, $1}, [$2];")
LOAD1: tl.constexpr = tl.constexpr("ld.global.nc.b32 $0, [$1];")
LOAD4_IF: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $5, 0;
mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
}""")
LOAD2_IF: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $3, 0;
mov.b32 $0, 0; mov.b32 $1, 0;
@p ld.global.v2.b32 {$0, $1}, [$2];
}""")
STREAM4_IF: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $5, 0;
@p ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];
}""")
COPY_UP_TO_16: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $4, 0;
@p cp.async.cg.shared.global [$1], [$2], 16, $3;
mov.b32 $0, 0;
}""")
HALVES: tl.constexpr = tl.constexpr("{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}")


@triton.jit
def thread_index(THREADS: tl.constexpr):
    """The thread's index in its program, whatever layout a compiler gives a tensor of as many elements."""
    return tl.inline_asm_elementwise(THREAD, "=r,r", [tl.arange(0, THREADS)], tl.int32, True, 1)


@triton.jit
def divide(k, by: tl.constexpr):
    """``k // by`` of an int32 that is not negative, without the steps that negative ones need."""
    return (k.to(tl.uint32) // by).to(tl.int32)


@triton.jit
def load4(pointer):
    """16 bytes a thread as four int32."""
    return tl.inline_asm_elementwise(LOAD4, "=r,=r,=r,=r,l", [pointer], (tl.int32,) * 4, False, 1)


@triton.jit
def load2(pointer):
    """8 bytes a thread as two int32."""
    return tl.inline_asm_elementwise(LOAD2, "=r,=r,l", [pointer], (tl.int32,) * 2, False, 1)


@triton.jit
def load1(pointer):
    """4 bytes a thread as an int32."""
    return tl.inline_asm_elementwise(LOAD1, "=r,l", [pointer], tl.int32, False, 1)


@triton.jit
def load4_if(pointer, mask):
    """As ``load4``, 0 where masked."""
    return tl.inline_asm_elementwise(
        LOAD4_IF, "=&r,=&r,=&r,=&r,l,r", [pointer, mask.to(tl.int32)], (tl.int32,) * 4, False, 1
    )


@triton.jit
def load2_if(pointer, mask):
    """As ``load2``, 0 where masked."""
    return tl.inline_asm_elementwise(LOAD2_IF, "=&r,=&r,l,r", [pointer, mask.to(tl.int32)], (tl.int32,) * 2, False, 1)


@triton.jit
def stream4_if(pointer, mask):
    """As ``load4``, of what is read once; where masked, anything."""
    return tl.inline_asm_elementwise(
        STREAM4_IF, "=&r,=&r,=&r,=&r,l,r", [pointer, mask.to(tl.int32)], (tl.int32,) * 4, False, 1
    )


@triton.jit
def floats(registers, DTYPE: tl.constexpr):
    """Four neighbouring numbers in float32 from the two or four registers that hold them."""
    if DTYPE == tl.float32:
        return (
            registers[0].to(tl.float32, bitcast=True),
            registers[1].to(tl.float32, bitcast=True),
            registers[2].to(tl.float32, bitcast=True),
            registers[3].to(tl.float32, bitcast=True),
        )
    elif DTYPE == tl.float16:
        low = tl.inline_asm_elementwise(HALVES, "=f,=f,r", [registers[0]], (tl.float32, tl.float32), True, 1)
        return low + tl.inline_asm_elementwise(HALVES, "=f,=f,r", [registers[1]], (tl.float32, tl.float32), True, 1)
    else:
        return (
            (registers[0] << 16).to(tl.float32, bitcast=True),
            (registers[0] & -65536).to(tl.float32, bitcast=True),
            (registers[1] << 16).to(tl.float32, bitcast=True),
            (registers[1] & -65536).to(tl.float32, bitcast=True),
        )


@triton.jit
def _turn(field, BITS: tl.constexpr):
    """The bit of a field of this word or, past its end, of the next."""
    return tl.where(field < 32 // BITS, field, field - 32 // BITS) * BITS


@triton.jit
def zero_points(first, second, n, BITS: tl.constexpr):
    """Four neighbouring zero-points in float32, from their word or, where 32 is no multiple of BITS, two words.

    ``n`` is the first one's output feature, a multiple of 4.
    """
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
    return (
        (a & ONES).to(tl.float32),
        (b & ONES).to(tl.float32),
        (c & ONES).to(tl.float32),
        (d & ONES).to(tl.float32),
    )


@triton.jit
def store(out, bias, value, n, m, N, mask):
    """Writes a float32 sum plus the bias to ``out[m, n]``."""
    if bias is not None:
        value += tl.load(bias + n, mask=mask, other=0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * N + n, value.to(out.dtype.element_ty), mask=mask)
