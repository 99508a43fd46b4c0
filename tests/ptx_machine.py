"""A machine for the PTX of small kernels: every thread of a program at once, in numpy, with no GPU.

It knows the instructions that our decode kernels compile to, and none else. Threads run in lockstep, so a branch must
be taken by all or by none; copies and barriers are done at once, so a missing wait is not found. Reads and writes
outside the arguments, and those that are not aligned, are errors. Tensor-core sums are exact, then rounded to float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Machine"]

Values = NDArray[np.uint64]
U = np.uint64
LOW32 = U(0xFFFFFFFF)
FLOATS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
}
BITWISE: dict[str, Callable[..., Any]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
COMPARE: dict[str, Callable[..., Any]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


class Machine:
    """One compiled kernel with its arguments: arrays in a memory of their own, and integers."""

    def __init__(self, ptx: str, arguments: list[NDArray[Any] | int]) -> None:
        self.threads = int(re.findall(r"\.reqntid (\d+)", ptx)[0])
        self.shared_at: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.code: list[tuple[str, str, list[str]]] = []
        self._parse(ptx)
        size, self.places = 4096, []
        for argument in arguments:
            self.places.append(size if isinstance(argument, np.ndarray) else argument)
            size += -(-argument.nbytes // 256) * 256 + 4096 if isinstance(argument, np.ndarray) else 0
        self.memory, self.inside = np.full(size, 255, np.uint8), np.zeros(size, bool)
        for argument, place in zip(arguments, self.places, strict=True):
            if isinstance(argument, np.ndarray):
                self.memory[place : place + argument.nbytes] = argument.reshape(-1).view(np.uint8)
                self.inside[place : place + argument.nbytes] = True

    def bytes_of(self, argument: int, count: int) -> NDArray[np.uint8]:
        """The first bytes of an array after a run."""
        return self.memory[self.places[argument] : self.places[argument] + count].copy()

    def run(self, program: int) -> None:
        """One program, from its first instruction to the last."""
        self.registers: dict[str, Values] = {
            "%tid.x": np.arange(self.threads, dtype=U),
            "%ctaid.x": np.full(self.threads, program, U),
        }
        self.shared = np.zeros(max(1, self.shared_size), np.uint8)
        at = 0
        while at < len(self.code):
            guard, name, operands = self.code[at]
            at += 1
            live = np.ones(self.threads, bool)
            if guard:
                live = self.value(guard.lstrip("!")).astype(bool) ^ guard.startswith("!")
            if name == "bra":
                assert live.all() or not live.any(), "threads part"
                at = self.labels[operands[0]] if live.all() else at
            else:
                self.step(name.split("."), operands, live)

    def _parse(self, ptx: str) -> None:
        text = ptx[ptx.index(".reqntid") :]
        text = re.sub(r"//[^\n]*|\.(?:loc|pragma)[^\n]*", "", text[text.index("{") + 1 :].split(".section")[0])
        self.shared_size = 0
        for name, size in re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\];", text):
            self.shared_at[name] = self.shared_size
            self.shared_size += -(-int(size) // 128) * 128
        text = re.sub(r"\.shared \.align[^;]*;|\.reg[^;]*;", "", text)
        for statement in re.sub(r"(\$L\w+):", r";label \1;", text).split(";"):
            found = re.match(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)$", statement.strip().lstrip("{} \n\t"), re.S)
            if not found:
                continue
            guard, name, rest = found.groups()
            if name == "label":
                self.labels[rest.strip()] = len(self.code)
            elif name == "ret":
                return
            else:
                self.code.append((guard or "", name, re.findall(r"[{\[][^}\]]*[}\]]|[^,\s]+", rest)))

    def value(self, operand: str) -> Values:
        if operand in self.registers:
            return self.registers[operand]
        if operand in self.shared_at:
            number = self.shared_at[operand]
        else:
            number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return np.full(self.threads, number & 0xFFFFFFFFFFFFFFFF, U)

    def put(self, name: str, values: NDArray[Any], live: NDArray[np.bool_]) -> None:
        before = self.registers.get(name)
        if not live.all() and before is None:
            before = np.full(self.threads, 0xDEADBEEF, U)  # nobody may rely on it
        self.registers[name] = values.astype(U) if live.all() else np.where(live, values.astype(U), before)

    def address(self, operand: str, shared: bool) -> NDArray[np.int64]:
        base, _, offset = operand.strip("[] ").partition("+")
        at = self.value(base.strip()).astype(np.int64) + int(offset or 0)
        return at & 0xFFFFFFFF if shared else at

    def bytes_at(self, shared: bool, at: NDArray[np.int64], count: int, live: NDArray[np.bool_], aligned: int) -> Any:
        """Indices of so many bytes of each live thread, which must exist."""
        assert (at[live] % aligned == 0).all(), "not aligned"
        index = np.where(live, at, at[live][0] if live.any() else 0)[:, None] + np.arange(count)
        if live.any():
            assert (index[live] < len(self.shared)).all() if shared else self.inside[index[live]].all(), "outside"
        return index

    def step(self, name: list[str], operands: list[str], live: NDArray[np.bool_]) -> None:
        kind = name[0]
        if kind in ("bar", "griddepcontrol") or (
            kind == "cp" and name[2] in ("commit_group", "wait_all", "wait_group")
        ):
            return
        special = {"ld": self.load, "st": self.store, "cp": self.copy, "mma": self.multiply}.get(kind)
        if special:
            special(name, operands, live)
        elif kind == "shfl":
            swapped = self.value(operands[1]).reshape(-1, 32)[:, np.arange(32) ^ int(operands[2])]
            self.put(operands[0], swapped.reshape(-1), live)
        elif kind == "mov" and operands[0].startswith("{"):
            low, high = vector(operands[0])
            both = self.value(operands[1])
            self.put(low, both & U(0xFFFF), live)
            self.put(high, both >> U(16) & U(0xFFFF), live)
        elif kind == "mov" and operands[1].startswith("{"):
            low, high = (self.value(part) & U(0xFFFF) for part in vector(operands[1]))
            self.put(operands[0], low | high << U(16), live)
        else:
            self.put(operands[0], self.compute(name, [self.value(o) for o in operands[1:]]), live)

    def load(self, name: list[str], operands: list[str], live: NDArray[np.bool_]) -> None:
        if name[1] == "param":
            number = int(re.findall(r"param_(\d+)", operands[1])[0])
            place = self.places[number] if number < len(self.places) else 0  # scratch, unused
            self.put(operands[0], np.full(self.threads, place & 0xFFFFFFFFFFFFFFFF, U), live)
            return
        shared, size, names = name[1] == "shared", int(name[-1][1:]) // 8, vector(operands[0])
        at = self.address(operands[1], shared)
        index = self.bytes_at(shared, at, size * len(names), live, size * len(names))
        taken = (self.shared if shared else self.memory)[index if live.any() else index * 0]
        for i, target in enumerate(names):
            self.put(target, taken[:, i * size : (i + 1) * size].copy().view(f"u{size}")[:, 0], live)

    def store(self, name: list[str], operands: list[str], live: NDArray[np.bool_]) -> None:
        if not live.any():
            return
        shared, size = name[1] == "shared", int(name[-1][1:]) // 8
        at = self.address(operands[0], shared)
        for i, source in enumerate(vector(operands[1])):
            index = self.bytes_at(shared, at + i * size, size, live, size)
            stored = self.value(source).view(np.uint8).reshape(-1, 8)[:, :size]
            (self.shared if shared else self.memory)[index[live]] = stored[live]

    def copy(self, name: list[str], operands: list[str], live: NDArray[np.bool_]) -> None:
        size, count = int(operands[2]), self.value(operands[3]).astype(np.int64)
        to, source = self.address(operands[0], True), self.address(operands[1], False)
        self.bytes_at(True, to, size, live, size)
        self.bytes_at(False, source, 1, live & (count > 0), size)
        for j in range(size):
            given, zero = live & (j < count), live & (j >= count)
            assert self.inside[source[given] + j].all(), "outside"
            self.shared[to[given] + j] = self.memory[source[given] + j]
            self.shared[to[zero] + j] = 0

    def multiply(self, name: list[str], operands: list[str], live: NDArray[np.bool_]) -> None:
        """mma.sync m16n8k8 or m16n8k16; which element a lane's register holds is in the PTX manual."""
        depth, warps, lane = 16 if "m16n8k16" in name else 8, self.threads // 32, np.arange(32)
        row, pair = lane >> 2, 2 * (lane & 3)
        a, b = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
        c = np.zeros((warps, 16, 8))
        for i, source in enumerate(vector(operands[1])):
            for half, values in enumerate(halves(self.value(source), "bf16" in name)):
                a[:, row + 8 * (i & 1), pair + half + 8 * (i >> 1)] = values.reshape(warps, 32)
        for i, source in enumerate(vector(operands[2])):
            for half, values in enumerate(halves(self.value(source), "bf16" in name)):
                b[:, pair + half + 8 * i, row] = values.reshape(warps, 32)
        for i, source in enumerate(vector(operands[3])):
            c[:, row + 8 * (i >> 1), pair + (i & 1)] = floats(self.value(source)).reshape(warps, 32)
        sums = (a @ b + c).astype(np.float32)
        for i, target in enumerate(vector(operands[0])):
            self.put(target, bits(sums[:, row + 8 * (i >> 1), pair + (i & 1)].reshape(-1)), live)

    def compute(self, name: list[str], x: list[Values]) -> NDArray[Any]:  # noqa: PLR0911
        kind, last = name[0], name[-1]
        size = 64 if last.endswith("64") else 16 if last.endswith("16") else 32
        mask, signed = U((1 << size) - 1), last.startswith("s")
        number = (lambda v: v.view(np.int64) if size == 64 else integers(v)) if signed else (lambda v: v & mask)
        if last == "pred":
            return BITWISE[kind](*(v.astype(bool) for v in x)) if len(x) == 2 else ~x[0].astype(bool)
        if last == "f32" and kind in FLOATS:
            return bits(FLOATS[kind](*map(floats, x)))
        if kind == "cvt":
            return convert(name[-2], last, x[0])
        if kind in ("mul", "mad"):
            if "wide" in name:
                product = (integers(x[0]) * integers(x[1])).view(U) if signed else (x[0] & mask) * (x[1] & mask)
            elif "hi" in name:
                return (x[0] & mask) * (x[1] & mask) >> U(size)
            else:
                product = x[0] * x[1]
            product = product + x[2] if kind == "mad" else product
            return product if "wide" in name else product & mask
        if kind == "setp":
            return COMPARE[name[1]](number(x[0]), number(x[1]))
        if kind in ("min", "max"):
            return (np.minimum if kind == "min" else np.maximum)(number(x[0]), number(x[1])).view(U) & mask
        if kind in BITWISE:
            return BITWISE[kind](x[0], x[1]) & mask
        simple: dict[str, Callable[[], NDArray[Any]]] = {
            "mov": lambda: x[0] & mask,
            "add": lambda: x[0] + x[1] & mask,
            "sub": lambda: x[0] - x[1] & mask,
            "shl": lambda: x[0] << x[1] & mask,
            "shr": lambda: (number(x[0]) >> x[1].astype(np.int64)).view(U) & mask if signed else (x[0] & mask) >> x[1],
            "bfe": lambda: (x[0] & LOW32) >> x[1] & ((U(1) << x[2]) - U(1)),
            "div": lambda: (x[0] & LOW32) // (x[1] & LOW32),
            "rem": lambda: (x[0] & LOW32) % (x[1] & LOW32),
            "selp": lambda: np.where(x[2].astype(bool), x[0], x[1]) & mask,
            "prmt": lambda: permute(*x),
            "lop3": lambda: logic(*x),
        }
        return simple[kind]()


def vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def integers(values: Values) -> NDArray[np.int64]:
    return (values & LOW32).astype(np.uint32).view(np.int32).astype(np.int64)


def floats(values: Values) -> NDArray[np.float32]:
    return (values & LOW32).astype(np.uint32).view(np.float32)


def bits(values: NDArray[Any]) -> Values:
    return values.astype(np.float32).view(np.uint32).astype(U)


def halves(values: Values, bf16: bool) -> list[NDArray[np.float32]]:
    both = [values & U(0xFFFF), values >> U(16) & U(0xFFFF)]
    if bf16:
        return [floats(half << U(16)) for half in both]
    return [half.astype(np.uint16).view(np.float16).astype(np.float32) for half in both]


def convert(to: str, source: str, x: Values) -> NDArray[Any]:
    if to == "f32":
        if source in ("f16", "bf16"):
            return bits(halves(x, source == "bf16")[0])
        return bits(integers(x) if source == "s32" else x & LOW32)
    if to == "f16":
        return floats(x).astype(np.float16).view(np.uint16)
    if to == "bf16":  # to nearest, ties to even
        return x + U(0x7FFF) + (x >> U(16) & U(1)) >> U(16) & U(0xFFFF)
    if source == "s32":
        return integers(x).view(U)
    return x & U((1 << int(source[1:])) - 1) & U((1 << int(to[1:])) - 1)


def permute(a: Values, b: Values, selector: Values) -> Values:
    both, found = (b & LOW32) << U(32) | a & LOW32, np.zeros_like(a)
    for i in range(4):
        found |= (both >> (selector >> U(4 * i) & U(7)) * U(8) & U(255)) << U(8 * i)
    return found


def logic(a: Values, b: Values, c: Values, table: Values) -> Values:
    found = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found & LOW32
