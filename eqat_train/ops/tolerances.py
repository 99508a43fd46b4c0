"""How far a kernel may be from a float64 reference: one table, for the tests and the benchmarks.

The error is ``||actual - expected|| / ||expected||`` over all elements, with ``expected`` computed in float64 from the
very inputs the kernel got. 0 means bit for bit equal to the float64 (or float32) result rounded once to the dtype.

A bound is about three times what the format of the result and of the operands costs: storing in float16 costs
``2**-11 / sqrt(3)`` = 2.8e-4, in bfloat16 2.3e-3, and the weight operand of a 16-bit matmul is rounded as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "relative_error", "within_tolerance"]

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# op -> result -> dtype of the op's floating operands -> largest relative error
TOLERANCES: dict[str, dict[str, dict[torch.dtype, float]]] = {
    "fake_quant": {
        "weight": {F16: 0.0, BF16: 0.0, F32: 0.0},
        "grad": {F16: 1e-5, BF16: 1e-5, F32: 1e-5},  # sums in float32 over a group, of exact terms
    },
    "dequant": {"weight": {F16: 0.0, BF16: 0.0, F32: 0.0}},
    "dequant_matmul": {
        "output": {F16: 1e-3, BF16: 8e-3, F32: 1e-5},
        "grad_x": {F16: 1e-3, BF16: 8e-3, F32: 1e-5},
    },
    "cross_entropy": {"losses": {F16: 1e-6, BF16: 1e-6, F32: 1e-6}, "grad": {F16: 1e-3, BF16: 8e-3, F32: 1e-6}},
    "distillation": {"losses": {F16: 1e-5, BF16: 1e-5, F32: 1e-5}, "grad": {F16: 1e-3, BF16: 8e-3, F32: 1e-5}},
    "gated_silu": {"output": {F16: 1e-3, BF16: 8e-3, F32: 1e-6}, "grad": {F16: 1e-3, BF16: 8e-3, F32: 1e-6}},
    "rotary": {"output": {F16: 1e-3, BF16: 8e-3, F32: 1e-6}, "grad": {F16: 1e-3, BF16: 8e-3, F32: 1e-6}},
    "add_rms_norm": {"output": {F16: 1e-3, BF16: 8e-3, F32: 1e-6}, "grad": {F16: 1e-3, BF16: 8e-3, F32: 1e-6}},
    "decode_attention": {
        "output": {F16: 2e-3, BF16: 1.6e-2, F32: 1e-5},  # rotated queries and keys, and weights, are rounded as well
        "keys": {F16: 1e-3, BF16: 8e-3, F32: 1e-6},
    },
    "scale_grad": {"grad": {F16: 1e-4, BF16: 1e-4, F32: 1e-5}},  # float32 sums of exact products
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; infinite where a value is missing (NaN)."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    error = float(difference / expected.detach().double().norm().clamp_min(torch.finfo(torch.float64).tiny))
    return math.inf if math.isnan(error) else error


def within_tolerance(op: str, result: str, dtype: torch.dtype, actual: Tensor, expected: Tensor) -> tuple[bool, str]:
    """Whether a result is right, and a line that says by how much."""
    bound = TOLERANCES[op][result][dtype]
    if bound == 0.0:
        wrong = int((actual != expected.to(actual.dtype)).sum())  # NaN differs from everything
        return wrong == 0, f"{op} {result} {dtype}: {wrong} of {actual.numel()} elements differ"
    error = relative_error(actual, expected)
    return error <= bound, f"{op} {result} {dtype}: relative error {error:.2e}, at most {bound:g}"
