"""Packed linear for 1 to 16 rows of x, on tensor cores: a kernel for one row and one for several.

A lane reads four neighbouring words at once; the four lanes that share output features hold four rows of words,
together a *unit* of ``4 * 32 / bits`` input features times 32 output features. Warps split K and are added at the end
in their order: the same input gives the same bits every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from ..launches import may_overlap
from ..packed import PackedWeight
from .decode_row import decode_row_kernel
from .decode_rows import decode_rows_kernel
from .inputs import staged_bytes
from .ptx import fields, most_chains, multiply, pair_inputs, pairs, sum_inputs, sum_warps, unpack_words

__all__ = ["MAX_ROWS", "Plan", "decode_matmul", "decode_refusal"]

MAX_ROWS = 16
FEATURES = 32  # output features a warp
COLUMNS = 8  # of a tensor core's tile
MOST_SHARED = 48 << 10  # bytes of shared memory that assembly may declare


@dataclass(frozen=True)
class Plan:
    """How a layer's words are divided.

    Attributes:
        deep: warps of a program that split K.
        units: that a warp loads at once.
        across: warps of a program that hold other output features, for 2 rows and more.
        wide: times 32 output features a warp, for 2 rows and more.
        chains: of products that do not wait for each other, for one row.
        registers: a thread may have, or None; fewer let more programs run at a time.
    """

    deep: int
    units: int
    across: int = 1
    wide: int = 1
    chains: int = 1
    registers: int | None = None


def choose(bits: int, words: int, out_features: int, rows: int) -> Plan:
    """The plan for a layer, from measurements on an H200 (docs/results.md)."""
    few = out_features <= 6144  # programs of 32 output features are then about one a multiprocessor
    many = out_features > 16384
    return _plan_of_one_row(bits, words, few, many) if rows == 1 else _plan_of_rows(bits, few, many)


def _plan_of_one_row(bits: int, words: int, few: bool, many: bool) -> Plan:
    if few:
        return Plan(8, max(1, min(8, -(-words // 32))), chains=4)
    if bits == 3:
        return Plan(4, 8, registers=168)
    return Plan(4, 8, chains=1 if bits == 2 and not many else 2, registers=128 if bits == 2 or many else 168)


def _plan_of_rows(bits: int, few: bool, many: bool) -> Plan:
    if few:
        return {2: Plan(16, 1), 3: Plan(8, 8)}.get(bits, Plan(8, 4))
    if bits == 2:
        return Plan(4, 1, 4, 2, registers=128) if many else Plan(4, 1, 2, 2)
    if bits == 3:
        return Plan(2, 4, 4, 2) if many else Plan(4, 4, registers=168)
    return Plan(4, 4, 2, 2)


def decode_refusal(x: Tensor, packed: PackedWeight, scales: Tensor) -> str | None:
    """Why these kernels cannot compute ``x`` ``[rows, in]``, or None."""
    if not 0 < x.shape[0] <= MAX_ROWS:
        return f"x has {x.shape[0]} rows, not 1 to {MAX_ROWS}"
    if packed.g_idx is not None:
        return "groups are not consecutive"
    if any(tensor.data_ptr() % 16 for tensor in (x, packed.qweight, packed.qzeros, scales)):
        return "a tensor does not start at a multiple of 16 bytes"
    layer = packed.bits, _width(packed), packed.in_features, packed.out_features
    return _layer_refusal(*layer, x.shape[0] > 1, x.dtype, x.device)


@cache
def _layer_refusal(
    bits: int, width: int, in_features: int, out_features: int, several: bool, dtype: torch.dtype, device: torch.device
) -> str | None:
    step = 32 // bits if bits != 3 else 8 if several else 2  # 3-bit words may lie in two groups
    problems = {
        "the interpreter runs no assembly": triton.knobs.runtime.interpret,
        f"x is {dtype}, not float16 or bfloat16": dtype not in (torch.float16, torch.bfloat16),
        f"out_features {out_features} is no multiple of {FEATURES}": out_features % FEATURES != 0,
        f"in_features {in_features} or groups of {width} are no multiples of {step}": (
            in_features % step != 0 or width % step != 0
        ),
        f"groups of {width} are too short": _block(bits, width, 1, spread=False) == 0 or (bits == 3 and width < 10),
        "it needs an NVIDIA GPU of compute capability 8.0": (
            device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0)
        ),
    }
    return next((why for why, true in problems.items() if true), None)


def decode_matmul(
    x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, plan: Plan | None = None
) -> Tensor:
    """``x`` ``[1 to 16, in]`` times the weight, plus ``bias``: ``[rows, out]`` in the dtype of ``x``."""
    overlap = may_overlap(x.device) and scales.is_contiguous()  # a copy of scales would be the kernel before
    x, scales = x.contiguous(), scales.detach().contiguous()
    plan = plan or choose(packed.bits, packed.qweight.shape[0], packed.out_features, x.shape[0])
    out = x.new_empty(x.shape[0], packed.out_features)
    (_one_row if x.shape[0] == 1 else _rows)(x, packed, scales, bias, out, plan, overlap)
    return out


def _one_row(
    x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, out: Tensor, plan: Plan, overlap: bool
) -> None:
    bits, bf16 = packed.bits, x.dtype == torch.bfloat16
    words, width = packed.qweight.shape[0], _width(packed)
    spread = bits != 3 and width % (4 * 32 // bits) == 0
    units, steps, shared = plan.units, 0, MOST_SHARED + 1
    while shared > MOST_SHARED:  # many short groups
        block = _block(bits, width, units, spread)
        thread = units // block * 2 * (4 * scales.dtype.itemsize + (4 if 32 % bits == 0 else 8))
        steps = -(-words // (4 * units * plan.deep))
        shared = plan.deep * max(min(steps, 2) * (32 * thread + units * 4 * (32 // bits) * 2), 128)
        units -= 1
    units += 1
    chains = min(plan.chains, most_chains(bits, bf16))
    total, total_operands = sum_warps(1, plan.deep)
    decode_row_kernel[(packed.out_features // FEATURES,)](
        *(x, packed.qweight, packed.qzeros, scales, bias, out),
        *(packed.in_features, packed.out_features, words, packed.groups, packed.qzeros.shape[1], 0),
        BITS=bits,
        GROUP=width,
        **_assembly(bits, bf16, chains),
        CHAINS=chains,
        SUM=total,
        SUM_OPERANDS=total_operands,
        SHARED=_shared(shared),
        SPREAD=spread,
        BLOCK=block,
        UNITS=units,
        STEPS=steps,
        WARPS=plan.deep,
        OVERLAP=overlap,
        num_warps=plan.deep,
        launch_pdl=overlap,
        maxnreg=plan.registers,
    )


def _rows(
    x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, out: Tensor, plan: Plan, overlap: bool
) -> None:
    bits, bf16 = packed.bits, x.dtype == torch.bfloat16
    width, tiles = _width(packed), -(-x.shape[0] // COLUMNS)
    group_units = _group_units(bits, width, packed.groups)
    # inputs of a piece stay in registers
    sizes = [size for size in range(1, plan.units + 1) if plan.units % size == 0 and group_units % size == 0]
    piece = max(size for size in sizes if size == 1 or size * pairs(bits) * tiles <= 40)
    total, total_operands = sum_warps(8 * tiles, plan.deep, plan.across)
    # warps across share their inputs in shared memory, copied 8 inputs at a time
    staged = plan.across > 1 and width % 8 == 0 and packed.in_features % 8 == 0
    stages = staged_bytes(bits, tiles, plan.deep * plan.units) if staged else 0
    decode_rows_kernel[(triton.cdiv(packed.out_features, FEATURES * plan.wide * plan.across),)](
        *(x, packed.qweight, packed.qzeros, scales, bias, out),
        *(x.shape[0], packed.in_features, packed.out_features, packed.qweight.shape[0]),
        *(packed.groups, packed.qzeros.shape[1], 0),
        BITS=bits,
        GROUP=width,
        GROUP_UNITS=group_units,
        EXACT=group_units * 4 * (32 // bits) == width and packed.in_features % width == 0,
        **_assembly(bits, bf16, 1),
        SUM=total,
        SUM_OPERANDS=total_operands,
        SHARED=_shared(max(128 * 8 * tiles * plan.deep * plan.across, stages)),
        STAGED=staged,
        TILES=tiles,
        UNITS=plan.units,
        PIECE=piece,
        STEPS=-(-packed.groups * group_units // (plan.units * plan.deep)),
        WIDE=plan.wide,
        ACROSS=plan.across,
        DEEP=plan.deep,
        OVERLAP=overlap,
        num_warps=plan.deep * plan.across,
        launch_pdl=overlap,
        maxnreg=plan.registers,
    )


@cache
def _assembly(bits: int, bf16: bool, chains: int) -> dict[str, object]:
    """What both kernels do with a lane's words and inputs."""
    unpack, unpack_operands = unpack_words(bits, bf16)
    pair, pair_operands = pair_inputs(bits)
    sums, sums_operands = sum_inputs(bits, bf16)
    product, product_operands = multiply(bits, bf16, chains)
    return {
        "UNPACK": unpack,
        "UNPACK_OPERANDS": unpack_operands,
        "PAIR": pair,
        "PAIR_OPERANDS": pair_operands,
        "SUM_INPUTS": sums,
        "SUM_INPUTS_OPERANDS": sums_operands,
        "MULTIPLY": product,
        "MULTIPLY_OPERANDS": product_operands,
        "REGISTERS": len(fields(bits, bf16)),
    }


def _group_units(bits: int, width: int, groups: int) -> int:
    """Units that hold a group wherever it starts. At 3 bits they come in fours, from a multiple of 40 inputs on."""
    if bits != 3:
        return -(-width // (4 * (32 // bits)))
    before = 40 - math.gcd(width, 40) if groups > 1 else 0
    return -(-(before + width) // 160) * 4


def _width(packed: PackedWeight) -> int:
    return packed.in_features if packed.group_size == -1 else packed.group_size


def _block(bits: int, width: int, units: int, spread: bool) -> int:
    """The most units, a divisor of ``units``, with a column for each or, if not ``spread``, for each group; or 0."""
    for block in range(units, 0, -1):
        span = 4 * (32 // bits) * block
        if spread:
            columns = block
        elif span % width == 0:
            columns = span // width
        else:
            columns = 1 if width % span == 0 else (span - 1) // width + 2
        if units % block == 0 and columns <= COLUMNS:
            return block
    return 0


def _shared(size: int) -> str:
    """Assembly that gives the address of so many bytes of shared memory."""
    return f"{{.shared .align 16 .b8 room[{size}]; mov.b32 $0, room;}}"
