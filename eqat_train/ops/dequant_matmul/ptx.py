"""PTX of the kernels for 1 to 16 rows of x: words to 16-bit numbers, and their products on tensor cores (mma.sync).

A lane holds four words, of output features ``n .. n + 3`` and the same input features. Field ``j`` and field
``j + fields / 2`` of a word become one register of two 16-bit numbers by one logic instruction: it leaves each field in
the mantissa of a power of two under which the field's lowest bit is 1. So a number is its code plus an *offset*, which
depends on the field's position alone, and both are exact. A tile of constants beside the weights' gives, with the same
inputs, minus their sum and minus their sum times offsets: what takes zero-points and offsets off again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

__all__ = [
    "Field",
    "fields",
    "most_chains",
    "multiply",
    "pair_inputs",
    "pairs",
    "sum_inputs",
    "sum_warps",
    "unpack_words",
]

LOW, HIGH = "0x5410", "0x7632"  # prmt selectors: the low, the high halves of two registers


@dataclass(frozen=True)
class Field:
    """What one register holds of both halves of a word.

    Attributes:
        pair: of inputs that it belongs to.
        shift: of the word to the right.
        mask: of the field in half a word so shifted.
        magic: 16 bits of a power of two, the offset.
        offset: what the register holds more than its part of the code.
        first: whether the register is the first or only part of its code.
    """

    pair: int
    shift: int
    mask: int
    magic: int
    offset: float
    first: bool


def pairs(bits: int) -> int:
    """Registers of two inputs that belong to a word."""
    return 32 // bits // 2


@cache
def fields(bits: int, bf16: bool) -> tuple[Field, ...]:
    """The registers that a word becomes, in the order in which they are multiplied.

    A code of 8 bits does not fit in bfloat16's mantissa beside the power of two; it comes in two parts of 4.
    """
    mantissa, bias = (7, 127) if bf16 else (10, 15)
    parts = 2 if bits > mantissa else 1
    width, count = bits // parts, pairs(bits) * parts
    found, shift = [], 0
    for i in range(count):
        if width * (i + 1) - shift > mantissa:  # as many fields as the mantissa holds, as high as they can be
            shift = max(width * count - mantissa, 0) if width * (count - i) <= mantissa else width * i
        position, weight = width * i - shift, i % parts * width
        power = mantissa - position + weight
        mask = ((1 << width) - 1) << position
        found.append(Field(i // parts, shift, mask, power + bias << mantissa, 2.0**power, weight == 0))
    return tuple(sorted(found, key=lambda field: not field.first))


@cache
def unpack_words(bits: int, bf16: bool) -> tuple[str, str]:
    """Assembly and constraints that unpack four words to ``len(fields)`` registers each, word by word."""
    kept = fields(bits, bf16)
    constants: dict[str, str] = {}
    lines = []
    for word in range(4):
        more, source = _halves(bits, f"${4 * len(kept) + word}", f"w{word}")
        lines += more
        for shift in sorted({field.shift for field in kept if field.shift}):
            lines.append(f".reg .b32 w{word}s{shift}; shr.u32 w{word}s{shift}, {source}, {shift};")
        for i, field in enumerate(kept):
            magic = constants.setdefault(_twice(field.magic), f"c{len(constants)}")
            shifted = f"w{word}s{field.shift}" if field.shift else source
            lines.append(f"lop3.b32 ${word * len(kept) + i}, {shifted}, {_twice(field.mask)}, {magic}, 0xEA;")
    return _scope(lines, constants), ",".join(["=&r"] * (4 * len(kept)) + ["r"] * 4)


@cache
def pair_inputs(bits: int) -> tuple[str, str]:
    """Assembly and constraints: from inputs in order of k, two a register, those of fields ``j`` and ``j + count``."""
    count = pairs(bits)
    lines = []
    for j in range(count):
        low, high = j, j + count
        if low % 2 == high % 2:
            selector = HIGH if low % 2 else LOW
        else:  # bytes of the low one's half, then of the high one's other half
            selector = "0x5432" if low % 2 else "0x7610"
        lines.append(f"prmt.b32 ${j}, ${count + low // 2}, ${count + high // 2}, {selector};")
    return _scope(lines, {}), ",".join(["=&r"] * count + ["r"] * count)


@cache
def multiply(bits: int, bf16: bool, chains: int = 1) -> tuple[str, str]:
    """Assembly and constraints of one step: the unpacked words of a lane times 8 columns of paired inputs.

    Operands, out: for each of so many chains of products that do not wait for each other 4 sums each of two tiles of 16
    output features, so that sum ``2 * t + c`` is of output feature ``n + t`` and column ``2 * r + c``. In: the unpacked
    words, the inputs, and the sums so far.
    """
    registers = len(fields(bits, bf16))
    names = iter(f"${i}" for i in range(16 * chains + 4 * registers + pairs(bits)))
    out = [next(names) for _ in range(8 * chains)]
    words = [[next(names) for _ in range(registers)] for _ in range(4)]
    inputs = [next(names) for _ in range(pairs(bits))]
    before = [next(names) for _ in range(8 * chains)]
    lines = []
    for number, step in enumerate(_steps(bits, bf16)):
        for tile in range(2):
            first = 8 * (number % chains) + 4 * tile
            sums = slice(first, first + 4)
            a = [words[2 * tile + half][i] for i, _ in step for half in range(2)]
            b = [inputs[field.pair] for _, field in step]
            lines.append(_product(out[sums], a, b, (before if number < chains else out)[sums], bf16))
    constraints = ["=&f"] * 8 * chains + ["r"] * (4 * registers + pairs(bits)) + ["f"] * 8 * chains
    return _scope(lines, {}), ",".join(constraints)


def most_chains(bits: int, bf16: bool) -> int:
    """The products of a step that could run apart."""
    return len(_steps(bits, bf16))


@cache
def sum_inputs(bits: int, bf16: bool) -> tuple[str, str]:
    """Assembly and constraints: minus the sums of paired inputs of columns ``2 * r`` and ``2 * r + 1``, then minus
    their sums times offsets. Operands, out: these four; in: the inputs, and the four so far."""
    count = pairs(bits)
    out, inputs = [f"${i}" for i in range(4)], [f"${4 + i}" for i in range(count)]
    before = [f"${4 + count + i}" for i in range(4)]
    constants: dict[str, str] = {}
    lines = []
    for number, step in enumerate(_steps(bits, bf16)):
        a = []
        for _, field in step:
            for value in (-1.0 if field.first else 0.0, -field.offset):
                a.append(constants.setdefault(_twice(_number(value, bf16)), f"c{len(constants)}"))
        lines.append(_product(out, a, [inputs[f.pair] for _, f in step], out if number else before, bf16))
    return _scope(lines, constants), ",".join(["=&f"] * 4 + ["r"] * count + ["f"] * 4)


def _steps(bits: int, bf16: bool) -> list[list[tuple[int, Field]]]:
    """Which one or two registers of a word each matrix product takes."""
    numbered = list(enumerate(fields(bits, bf16)))
    return [
        part[i : i + 2]
        for part in ([f for f in numbered if f[1].first], [f for f in numbered if not f[1].first])
        for i in range(0, len(part), 2)
    ]


def _product(out: list[str], a: list[str], b: list[str], before: list[str], bf16: bool) -> str:
    shape, kind = ("m16n8k16" if len(b) == 2 else "m16n8k8"), "bf16" if bf16 else "f16"
    operands = ", ".join("{" + ", ".join(part) + "}" for part in (out, a, b, before))
    return f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {operands};"


def _scope(lines: list[str], constants: dict[str, str]) -> str:
    """The lines in a scope of their own, after its constants."""
    named = [f".reg .b32 {name}; mov.b32 {name}, {value};" for value, name in constants.items()]
    return "\n".join(["{", *named, *lines, "}"])


def _halves(bits: int, word: str, name: str) -> tuple[list[str], str]:
    """Lines after which a register holds half of a word's fields from bit 0, the others from bit 16."""
    count = pairs(bits)
    if bits * count == 16:
        return [], word
    return [
        f".reg .b32 {name}h; shr.u32 {name}h, {word}, {bits * count};",
        f"prmt.b32 {name}h, {word}, {name}h, {LOW};",
    ], f"{name}h"


def _number(value: float, bf16: bool) -> int:
    """The 16 bits of a number that they hold, normal or 0."""
    bias, mantissa = (127, 7) if bf16 else (15, 10)
    fraction, exponent = math.frexp(abs(value))
    whole = 0 if value == 0 else (exponent - 1 + bias) << mantissa | int((2 * fraction - 1) * 2**mantissa)
    return (value < 0) << 15 | whole


def _twice(half: int) -> str:
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
    return _scope(lines, {}), ",".join(["=&f"] * outs + ["f"] * values + ["r"])
