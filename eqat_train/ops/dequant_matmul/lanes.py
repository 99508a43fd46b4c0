"""What a thread does by itself: indices, loads of 4 to 16 bytes, stores. One tensor element is one thread."""

# ruff: noqa: N803, N806 -- compile-time values are in capitals, and Triton compiles less than Python
# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["divide", "load1", "load2", "load4", "store", "stream4", "thread_index"]

THREAD: tl.constexpr = tl.constexpr("mov.u32 $0, %tid.x;")
LOAD4: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $5, 0;
mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];
}""")
LOAD2: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $3, 0;
mov.b32 $0, 0; mov.b32 $1, 0;
@p ld.global.nc.v2.b32 {$0, $1}, [$2];
}""")
LOAD1: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $2, 0;
mov.b32 $0, 0;
@p ld.global.nc.b32 $0, [$1];
}""")
STREAM4: tl.constexpr = tl.constexpr("""{
.reg .pred p;
setp.ne.b32 p, $5, 0;
mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
@p ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];
}""")


@triton.jit
def thread_index(THREADS: tl.constexpr):
    """The thread's index in its program, whatever layout a compiler gives a tensor of as many elements."""
    return tl.inline_asm_elementwise(THREAD, "=r,r", [tl.arange(0, THREADS)], tl.int32, True, 1)


@triton.jit
def divide(k, by: tl.constexpr):
    """``k // by`` of an int32 that is not negative, without the steps that negative ones need."""
    return (k.to(tl.uint32) // by).to(tl.int32)


@triton.jit
def load4(pointer, mask):
    """16 bytes a thread as four int32, 0 where masked."""
    INTS: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    return tl.inline_asm_elementwise(LOAD4, "=&r,=&r,=&r,=&r,l,r", [pointer, mask.to(tl.int32)], INTS, True, 1)


@triton.jit
def load2(pointer, mask):
    """8 bytes a thread as two int32."""
    INTS: tl.constexpr = (tl.int32, tl.int32)
    return tl.inline_asm_elementwise(LOAD2, "=&r,=&r,l,r", [pointer, mask.to(tl.int32)], INTS, True, 1)


@triton.jit
def load1(pointer, mask):
    """4 bytes a thread as an int32."""
    return tl.inline_asm_elementwise(LOAD1, "=&r,l,r", [pointer, mask.to(tl.int32)], tl.int32, True, 1)


@triton.jit
def stream4(pointer, mask):
    """As ``load4``, of what is read once."""
    INTS: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    return tl.inline_asm_elementwise(STREAM4, "=&r,=&r,=&r,=&r,l,r", [pointer, mask.to(tl.int32)], INTS, True, 1)


@triton.jit
def store(out, bias, value, n, m, N, mask):
    """Writes a float32 sum plus the bias to ``out[m, n]``."""
    if bias is not None:
        value += tl.load(bias + n, mask=mask, other=0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * N + n, value.to(out.dtype.element_ty), mask=mask)
