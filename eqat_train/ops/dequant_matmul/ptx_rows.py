"""PTX of the kernel for 2 to 16 rows of x: words to 16-bit weights, and their products on tensor cores.

A weight is ``(q - z) * s`` rounded once, as everywhere: ``q - z`` is exact, by a mask that leaves the field in the
mantissa of a power of two and one fused multiply-add that takes that power and ``z`` off and moves the field down.
Scales of another dtype are split in two numbers of 16 bits, so that they are not rounded before the product.
"""

from __future__ import annotations

from functools import cache

from .ptx import halves, pair_inputs, pairs, scope, twice

__all__ = ["multiply_weights", "weights"]


@cache
def weights(bits: int, bf16: bool, packed_scales: bool) -> tuple[str, str]:
    """Assembly and constraints that turn four words to ``pairs(bits)`` registers of two weights each, word by word.

    Operands in: the words; per group their scales, two registers of 16-bit numbers if ``packed_scales`` or else four
    in float32; per group the four zero-points, int32. At 3 bits a word may lie in two groups: there are two of each
    group's operands, and at the end ``pairs(3)`` selectors of ``prmt`` that pick halves of the first or the second.
    """
    count, groups = pairs(bits), 2 if bits == 3 else 1
    asm = _Assembly(bits, bf16)
    names = iter(f"${i}" for i in range(1000))
    outputs = [[next(names) for _ in range(count)] for _ in range(4)]
    words = [next(names) for _ in range(4)]
    scales = [[next(names) for _ in range(2 if packed_scales else 4)] for _ in range(groups)]
    zeros = [[next(names) for _ in range(4)] for _ in range(groups)]
    selectors = [next(names) for _ in range(count)] if groups == 2 else []
    for t in range(4):
        factors = [asm.scale(scales[g], t, packed_scales, f"s{t}{g}") for g in range(groups)]
        asm.word(words[t], outputs[t], factors, [zeros[g][t] for g in range(groups)], selectors, f"w{t}")
    inputs = ["r"] * 4 + (["r"] * 2 if packed_scales else ["f"] * 4) * groups + ["r"] * (4 * groups + len(selectors))
    return scope(asm.lines, asm.constants), ",".join(["=&r"] * (4 * count) + inputs)


@cache
def multiply_weights(bits: int, bf16: bool) -> tuple[str, str]:
    """Assembly and constraints of one step: the weights of a lane times 8 columns of inputs.

    Operands, out: 4 sums each of two tiles of 16 output features. In: the weights, ``pairs(bits)`` registers of inputs
    in the order of k, and the sums so far.
    """
    count, kind = pairs(bits), "bf16" if bf16 else "f16"
    names = iter(f"${i}" for i in range(16 + 5 * count))
    out = [next(names) for _ in range(8)]
    words = [[next(names) for _ in range(count)] for _ in range(4)]
    inputs = [next(names) for _ in range(count)]
    before = [next(names) for _ in range(8)]
    lines = pair_inputs(inputs, "x")
    for j in range(0, count, 2):
        step = range(j, min(j + 2, count))
        shape = "m16n8k16" if len(step) == 2 else "m16n8k8"
        for tile in range(2):
            a = [words[2 * tile + half][i] for i in step for half in range(2)]
            into = slice(4 * tile, 4 * tile + 4)
            parts = (out[into], a, [f"x_{i}" for i in step], (out if j else before)[into])
            operands = ", ".join("{" + ", ".join(part) + "}" for part in parts)
            lines.append(f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {operands};")
    return scope(lines, {}), ",".join(["=&f"] * 8 + ["r"] * (5 * count) + ["f"] * 8)


class _Assembly:
    """Lines that unpack words of one kind, and the constants they name."""

    def __init__(self, bits: int, bf16: bool) -> None:
        self.bits, self.bf16 = bits, bf16
        self.lines: list[str] = []
        self.constants: dict[str, str] = {}
        self.type = "bf16x2" if bf16 else "f16x2"
        self.mantissa = 7 if bf16 else 10
        self.magic, self.minus_magic = ("0x43004300", 0xC300C300) if bf16 else ("0x64006400", 0xE400E400)

    def constant(self, value: float) -> str:
        """A register of two equal numbers."""
        return self.constants.setdefault(twice(value, self.bf16), f"c{len(self.constants)}")

    def scale(self, registers: list[str], t: int, packed: bool, name: str) -> list[str]:
        """Registers with a scale twice: itself, or what is nearest to it in 16 bits and the rest."""
        self.lines.append(f".reg .b32 {name}, {name}l;")
        if packed:
            pick = "0x3232" if t % 2 else "0x1010"
            self.lines.append(f"prmt.b32 {name}, {registers[t // 2]}, {registers[t // 2]}, {pick};")
            return [name]
        self.lines += [
            f".reg .f32 {name}f; .reg .b16 {name}h, {name}g;",
            f"cvt.rn.{self.type}.f32 {name}, {registers[t]}, {registers[t]};",
            f"mov.b32 {{{name}h, {name}g}}, {name};",
            f"cvt.f32.{self.type[:-2]} {name}f, {name}h;",
            f"sub.f32 {name}f, {registers[t]}, {name}f;",
            f"cvt.rn.{self.type}.f32 {name}l, {name}f, {name}f;",
        ]
        return [name, f"{name}l"]

    def offsets(self, zero: str, width: int, name: str) -> dict[int, str]:
        """For each position a field may have, what is added after the field was moved down."""
        self.lines += [
            f".reg .b32 {name};",
            f"prmt.b32 {name}, {zero}, {zero}, 0x1010;",
            f"or.b32 {name}, {name}, 0x{self.minus_magic:08x};",
        ]
        found = {0: name}
        for position in self.positions(width):
            if position:
                found[position] = f"{name}_{position}"
                rest = self.constant(2.0**self.mantissa - 2.0 ** (self.mantissa - position))
                one = self.constant(1.0)
                self.lines += [
                    f".reg .b32 {name}_{position};",
                    f"fma.rn.{self.type} {name}_{position}, {name}, {one}, {rest};",
                ]
        return found

    def positions(self, width: int) -> list[int]:
        """Where fields may lie for the mantissa to hold them."""
        return list(range(0, self.mantissa - width + 1, self.bits))

    def word(
        self, word: str, outputs: list[str], scales: list[list[str]], zeros: list[str], selectors: list[str], name: str
    ) -> None:
        """The weights of a word."""
        lines, source = halves(self.bits, word, name)
        self.lines += lines
        nibbles = self.bits == 8 and self.bf16  # 8 bits do not fit bfloat16's mantissa beside the power of two
        width = 4 if nibbles else self.bits
        if nibbles:
            self.lines += [
                f".reg .b32 {name}zl, {name}zh;",
                f"and.b32 {name}zl, {zeros[0]}, 15;",
                f"shr.u32 {name}zh, {zeros[0]}, 4;",
            ]
            zeros = [f"{name}zl"]
        moved = [self.offsets(zero, width, f"{name}z{g}") for g, zero in enumerate(zeros)]
        high = self.offsets(f"{name}zh", width, f"{name}zz")[0] if nibbles else ""
        per_shift = len(self.positions(width))
        self.lines.append(f".reg .b32 {name}s, {name}t, {name}u;")
        shifted = source
        for j, output in enumerate(outputs):
            position = self.bits * (j % per_shift)
            if j and position == 0:
                shifted = f"{name}s"
                self.lines.append(f"shr.u32 {shifted}, {source}, {self.bits * j};")
            self.field(output, shifted, position, width, self.pick([m[position] for m in moved], selectors, j, name))
            if nibbles:
                self.lines.append(f"shr.u32 {name}t, {source}, {self.bits * j + 4};")
                self.field(f"{name}t", f"{name}t", 0, width, high)
                self.lines.append(f"fma.rn.{self.type} {output}, {name}t, {self.constant(16.0)}, {output};")
            scale = self.pick([s[0] for s in scales], selectors, j, name)
            if len(scales[0]) == 1:
                self.lines.append(f"fma.rn.{self.type} {output}, {output}, {scale}, {self.constant(0.0)};")
            else:
                self.lines.append(f"mov.b32 {name}t, {scale};")
                rest = self.pick([s[1] for s in scales], selectors, j, name)
                self.lines += [
                    f"fma.rn.{self.type} {name}u, {output}, {rest}, {self.constant(0.0)};",
                    f"fma.rn.{self.type} {output}, {output}, {name}t, {name}u;",
                ]

    def field(self, output: str, source: str, position: int, width: int, offset: str) -> None:
        """The field of both halves at a position, plus what belongs to that position."""
        mask = ((1 << width) - 1) << position
        self.lines += [
            f"lop3.b32 {output}, {source}, 0x{mask | mask << 16:08x}, {self.magic}, 0xEA;",
            f"fma.rn.{self.type} {output}, {output}, {self.constant(2.0**-position)}, {offset};",
        ]

    def pick(self, candidates: list[str], selectors: list[str], j: int, name: str) -> str:
        """Of two groups' registers, each half of the one that it belongs to."""
        if len(candidates) == 1:
            return candidates[0]
        self.lines.append(f"prmt.b32 {name}u, {candidates[0]}, {candidates[1]}, {selectors[j]};")
        return f"{name}u"
