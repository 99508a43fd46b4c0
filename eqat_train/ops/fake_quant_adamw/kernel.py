"""The Triton kernel: rows are groups, as in :mod:`eqat_train.ops.fake_quant.kernels`; a program updates whole groups.

Scales and zeros change before the weight can be quantized again. Groups that fit a tile keep their updated weights in
registers until then; wider ones are read a second time.
"""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from ..fake_quant.kernels import gradient_terms, quantized, stored_scale, stored_zero

__all__ = ["step_kernel"]


@triton.jit
def _adamw(
    p, g, first, second, at, mask, rate, bias1, bias2,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """The updated parameter; its moments are updated in memory."""
    m = tl.load(first + at, mask=mask, other=0.0)
    v = tl.load(second + at, mask=mask, other=0.0)
    m += (g - m) * (1.0 - BETA1)
    v = v * BETA2 + (1.0 - BETA2) * g * g
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    return p * (1.0 - rate * DECAY) - (rate * bias1) * m / (tl.sqrt(v) * bias2 + EPS)


@triton.jit
def step_kernel(
    weight,  # fp32 [groups, WIDTH]
    weight_first,
    weight_second,
    scales,  # fp32 [groups]
    scales_first,
    scales_second,
    zeros,  # fp32 [groups]
    zeros_first,
    zeros_second,
    gradient,  # any float [groups, WIDTH]
    dequantized,  # any float [groups, WIDTH]
    schedule,  # fp32 [steps, 5]
    step,  # int64 scalar
    groups,
    WIDTH: tl.constexpr,
    MAXQ: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SCALE_LOWEST: tl.constexpr,
    SCALE_HIGHEST: tl.constexpr,
    ZERO_LOWEST: tl.constexpr,
    ZERO_HIGHEST: tl.constexpr,
    TRAIN_WEIGHT: tl.constexpr,
    TRAIN_SCALES: tl.constexpr,
    TRAIN_ZEROS: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    DECAY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    now = schedule + tl.load(step) * 5
    bias1, bias2 = tl.load(now + 3), tl.load(now + 4)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < groups
    scale = tl.load(scales + row, mask=known, other=1.0)
    zero = tl.load(zeros + row, mask=known, other=0.0)
    s = stored_scale(scale, SCALE_DTYPE, SCALE_LOWEST, SCALE_HIGHEST)
    z = stored_zero(zero, ZERO_LOWEST, ZERO_HIGHEST)
    for_scale = tl.zeros([ROWS], tl.float32)
    for_zero = tl.zeros([ROWS], tl.float32)
    w = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at = row[:, None] * WIDTH + column[None, :]
        mask = known[:, None] & (column < WIDTH)[None, :]
        w = tl.load(weight + at, mask=mask, other=0.0)
        # Four elements a thread for 16-bit tensors as well: one layout for all, nothing goes through shared memory.
        g = tl.load(gradient + tl.max_contiguous(at, [1, 4]), mask=mask, other=0.0).to(tl.float32)
        dw, scale_terms, zero_terms = gradient_terms(w, s[:, None], z[:, None], g, MAXQ)
        for_scale += tl.sum(scale_terms, axis=1)
        for_zero += tl.sum(zero_terms, axis=1)
        if TRAIN_WEIGHT:
            w = _adamw(
                w, dw, weight_first, weight_second, at, mask, tl.load(now), bias1, bias2, BETA1, BETA2, EPS, DECAY
            )
            tl.store(weight + at, w, mask=mask)
    for_zero *= s  # the scale that the gradient was made with
    if TRAIN_SCALES:
        scale = _adamw(
            scale, for_scale, scales_first, scales_second, row, known, tl.load(now + 1), bias1, bias2,
            BETA1, BETA2, EPS, DECAY,
        )  # fmt: skip
        tl.store(scales + row, scale, mask=known)
        s = stored_scale(scale, SCALE_DTYPE, SCALE_LOWEST, SCALE_HIGHEST)
    if TRAIN_ZEROS:
        zero = _adamw(
            zero, for_zero, zeros_first, zeros_second, row, known, tl.load(now + 2), bias1, bias2,
            BETA1, BETA2, EPS, DECAY,
        )  # fmt: skip
        tl.store(zeros + row, zero, mask=known)
        z = stored_zero(zero, ZERO_LOWEST, ZERO_HIGHEST)
    if WIDTH > COLUMNS:
        tl.debug_barrier()  # the weights below were written above
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at = row[:, None] * WIDTH + column[None, :]
        mask = known[:, None] & (column < WIDTH)[None, :]
        if WIDTH > COLUMNS:
            w = tl.load(weight + at, mask=mask, other=0.0)
        made = quantized(w, s[:, None], z[:, None], MAXQ).to(dequantized.dtype.element_ty)
        tl.store(dequantized + tl.max_contiguous(at, [1, 4]), made, mask=mask)
