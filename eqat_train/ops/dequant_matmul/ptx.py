"""PTX of the kernel for one row of x: words to 16-bit integers, and their products on tensor cores (mma.sync m16n8k16).

A lane holds four words, of output features ``n .. n + 3`` and the same input features. Field ``j`` and field
``j + fields / 2`` of a word become one register of two 16-bit numbers, both exact, in one of two ways:

- *apart*, float16 alone: a mask and nothing else. What it leaves is the subnormal number ``q * 2**(position - 24)``;
  fields at one position are added up in sums of their own, a *class*, and the power of two is taken off the sums. The
  fewest instructions.
- not apart: a mask leaves the field in the mantissa of a power of two, and a fused multiply-add takes that power off
  and moves the field down. One class: the fewest registers.
"""

from __future__ import annotations

import math
from functools import cache

__all__ = ["classes", "multiply", "pairs", "sum_warps", "unpack_words"]

LOW, HIGH = "0x5410", "0x7632"  # prmt selectors: the low, the high halves of two registers


def pairs(bits: int) -> int:
    """Registers of two codes that a word unpacks to, which is also how many registers its inputs take."""
    return 32 // bits // 2


def classes(bits: int, apart: bool) -> list[float]:
    """What the sums of each class are to be multiplied with."""
    return [2.0 ** (24 - bits * i) for i in range(len(_steps(bits)))] if apart else [1.0]


def _steps(bits: int) -> list[tuple[int, ...]]:
    """Which one or two registers of a word each matrix product takes: those whose fields have one position."""
    count = pairs(bits)
    half = -(-count // 2)
    return [tuple(j for j in (i, i + half) if j < count) for i in range(half)]


@cache
def unpack_words(bits: int, bf16: bool, apart: bool) -> tuple[str, str]:
    """Assembly and constraints that unpack four words to ``pairs(bits)`` registers each, word by word."""
    count = pairs(bits)
    constants: dict[str, str] = {}
    lines = []
    for word in range(4):
        outputs = [f"${word * count + j}" for j in range(count)]
        source, name = f"${4 * count + word}", f"w{word}"
        lines += _mask(bits, source, outputs, name) if apart else _move(bits, bf16, source, outputs, name, constants)
    constraints = ["=&r"] * (4 * count) + ["r"] * 4
    return scope(lines, constants), ",".join(constraints)


@cache
def multiply(bits: int, bf16: bool, apart: bool) -> tuple[str, str]:
    """Assembly and constraints of one step: the unpacked words of a lane times 8 columns of inputs.

    Operands, out: for each class 4 sums each of two tiles of 16 output features, then 4 sums of the inputs alone. In:
    the unpacked words, ``pairs(bits)`` registers of inputs in the order of k, and the sums so far.
    """
    count, kind = pairs(bits), "bf16" if bf16 else "f16"
    sums = 8 * len(classes(bits, apart)) + 4
    names = iter(f"${i}" for i in range(2 * sums + 5 * count))
    out = [next(names) for _ in range(sums)]
    words = [[next(names) for _ in range(count)] for _ in range(4)]
    inputs = [next(names) for _ in range(count)]
    before = [next(names) for _ in range(sums)]
    started: set[int] = set()
    lines = pair_inputs(inputs, "x")
    for i, step in enumerate(_steps(bits)):
        shape = "m16n8k16" if len(step) == 2 else "m16n8k8"
        b = [f"x_{j}" for j in step]
        for tile in range(3):
            if tile < 2:
                a = [words[2 * tile + half][j] for j in step for half in range(2)]
                first = 4 * tile + (8 * i if apart else 0)
            else:
                a = ["one"] * 2 * len(b)
                first = sums - 4
            into = slice(first, first + 4)
            parts = (out[into], a, b, (out if first in started else before)[into])
            started.add(first)
            operands = ", ".join("{" + ", ".join(part) + "}" for part in parts)
            lines.append(f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {operands};")
    constraints = ["=&f"] * sums + ["r"] * (5 * count) + ["f"] * sums
    return scope(lines, {"0x3f803f80" if bf16 else "0x3c003c00": "one"}), ",".join(constraints)


def scope(lines: list[str], constants: dict[str, str]) -> str:
    """The lines in a scope of their own, after its constants."""
    named = [f".reg .b32 {name}; mov.b32 {name}, {value};" for value, name in constants.items()]
    return "\n".join(["{", *named, *lines, "}"])


def pair_inputs(registers: list[str], name: str) -> list[str]:
    """From inputs in order of k, two a register, those of fields ``j`` and ``j + count``."""
    count = len(registers)
    lines = [f".reg .b32 {name}_<{count}>;"]
    for j in range(count):
        low, high = j, j + count
        if low % 2 == high % 2:
            lines.append(
                f"prmt.b32 {name}_{j}, {registers[low // 2]}, {registers[high // 2]}, {HIGH if low % 2 else LOW};"
            )
        else:  # bytes of the low one's half, then of the high one's other half
            selector = "0x5432" if low % 2 else "0x7610"
            lines.append(f"prmt.b32 {name}_{j}, {registers[low // 2]}, {registers[high // 2]}, {selector};")
    return lines


def halves(bits: int, word: str, name: str) -> tuple[list[str], str]:
    """Lines after which a register holds half of a word's fields from bit 0, the others from bit 16."""
    count = pairs(bits)
    if bits * count == 16:
        return [], word
    return [
        f".reg .b32 {name}h; shr.u32 {name}h, {word}, {bits * count};",
        f"prmt.b32 {name}h, {word}, {name}h, {LOW};",
    ], f"{name}h"


def _mask(bits: int, word: str, outputs: list[str], name: str) -> list[str]:
    """Into ``outputs[j]`` the codes of fields ``j`` and ``j + count`` of a word, times ``2**(position - 24)``."""
    lines, both = halves(bits, word, name)
    steps = _steps(bits)
    lines.append(f".reg .b32 {name}s; shr.u32 {name}s, {both}, {bits * len(steps)};")
    for position, step in enumerate(steps):
        mask = ((1 << bits) - 1) << bits * position
        for j, source in zip(step, (both, f"{name}s"), strict=False):
            lines.append(f"and.b32 {outputs[j]}, {source}, 0x{mask | mask << 16:08x};")
    return lines


def _move(bits: int, bf16: bool, word: str, outputs: list[str], name: str, constants: dict[str, str]) -> list[str]:
    """Into ``outputs[j]`` the codes of fields ``j`` and ``j + count`` of a word."""

    def constant(value: float) -> str:
        return constants.setdefault(twice(value, bf16), f"c{len(constants)}")

    # fields end below the mantissa's last bit
    fma, magic, mantissa = ("fma.rn.bf16x2", "0x43004300", 7) if bf16 else ("fma.rn.f16x2", "0x64006400", 10)
    lines, both = halves(bits, word, name)
    lines.append(f".reg .b32 {name}s, {name}t;")
    source, shifted = both, 0
    width = 4 if bf16 and bits == 8 else bits  # 8 bits come in two parts where the mantissa has 7
    for j, output in enumerate(outputs):
        position = bits * j - shifted
        if position + width > mantissa:
            shifted, position, source = bits * j, 0, f"{name}s"
            lines.append(f"shr.u32 {name}s, {both}, {shifted};")
        mask = ((1 << width) - 1) << position
        scale, offset = constant(2.0**-position), constant(-(2.0 ** (mantissa - position)))
        lines += [
            f"lop3.b32 {output}, {source}, 0x{mask | mask << 16:08x}, {magic}, 0xEA;",
            f"{fma} {output}, {output}, {scale}, {offset};",
        ]
        if width < bits:
            lines += [
                f"shr.u32 {name}t, {both}, {bits * j + 4};",
                f"lop3.b32 {name}t, {name}t, 0x000f000f, {magic}, 0xEA;",
                f"{fma} {name}t, {name}t, {scale}, {offset};",
                f"{fma} {output}, {name}t, {constant(16.0)}, {output};",
            ]
    return lines


def twice(value: float, bf16: bool) -> str:
    """A number that 16 bits hold, normal or 0, as two equal halves of a register."""
    bias, mantissa = (127, 7) if bf16 else (15, 10)
    fraction, exponent = math.frexp(abs(value))
    whole = 0 if value == 0 else (exponent - 1 + bias) << mantissa | int((2 * fraction - 1) * 2**mantissa)
    half = (value < 0) << 15 | whole
    return f"0x{half | half << 16:08x}"


@cache
def sum_warps(values: int, deep: int, across: int = 1) -> tuple[str, str]:
    """Assembly and constraints that add ``values`` floats a thread over the warps that are ``deep``, in their order.

    Warp ``d * across + a`` is number ``d`` of those. The last operand is the address of shared memory that every
    thread is done with, ``128 * values * deep * across`` bytes. A thread of that warp gets, for ``i`` below
    ``ceil(values / deep)``, the sum of value ``d + i * deep`` of its own lane over the warps with its ``a``, or 0 past
    the last value.
    """
    outs = -(-values // deep)
    buffer, row = f"${outs + values}", 128 * deep * across  # bytes of a value
    lines = [
        f".reg .pred p; .reg .b32 at, t, v; .reg .f32 f<{deep}>;",
        "mov.u32 t, %tid.x;",
        "shl.b32 at, t, 2;",
        f"add.u32 at, at, {buffer};",
        "bar.sync 0;",
    ]
    lines += [f"st.shared.f32 [at + {i * row}], ${outs + i};" for i in range(values)]
    lines += [
        f"div.u32 v, t, {32 * across};",
        f"rem.u32 t, t, {32 * across};",
        f"mad.lo.u32 at, v, {row}, {buffer};",
        "shl.b32 t, t, 2;",
        "add.u32 at, at, t;",
        "bar.sync 0;",
    ]
    for i in range(outs):
        lines += [f"mov.f32 ${i}, 0f00000000;", f"setp.lt.u32 p, v, {values - i * deep};"]
        lines += [f"@p ld.shared.f32 f{d}, [at + {i * deep * row + d * across * 128}];" for d in range(deep)]
        lines += [f"@p add.f32 ${i}, ${i}, f{d};" for d in range(deep)]
    return scope(lines, {}), ",".join(["=&f"] * outs + ["f"] * values + ["r"])
