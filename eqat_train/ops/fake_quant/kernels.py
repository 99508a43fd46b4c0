"""Triton kernels of fake quantization: one pass over the weight forward, one backward.

A group of ``width`` divides its row, so a weight ``[out, in]`` in memory is ``out * groups`` rows of ``width``: one row
a group, with its scale and zero-point at the same index. A program owns ``ROWS`` whole groups, so their sums need no
atomics and do not depend on the order in which programs run. Groups wider than ``COLUMNS`` are walked in pieces.

Codes must be those that ``formats.affine.quantize`` packs, so ``w / s`` is divided as IEEE says and rounded to even.
"""

# ruff: noqa: N803 -- compile-time arguments are in capitals
# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel", "gradient_terms", "quantized", "stored_scale", "stored_zero"]

# Adding and subtracting it rounds to an integer, ties to even, where |t| < 2**22.
_ROUNDING = tl.constexpr(1.5 * 2**23)
# Steps beyond it clip whatever the zero-point is: |z| and maxq are at most 255.
_FARTHEST = tl.constexpr(1024.0)
_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def stored_scale(s, DTYPE: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Scales as ``DTYPE`` stores them, fp32."""
    s = tl.minimum(tl.maximum(s, LOWEST, propagate_nan=_NAN), HIGHEST, propagate_nan=_NAN)
    return s.to(DTYPE).to(tl.float32)


@triton.jit
def stored_zero(z, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Zero-points as integers LOWEST..HIGHEST, fp32."""
    z = tl.minimum(tl.maximum(z, LOWEST, propagate_nan=_NAN), HIGHEST, propagate_nan=_NAN)
    return (z + _ROUNDING) - _ROUNDING


@triton.jit
def _codes(w, s, z, MAXQ: tl.constexpr):
    """Steps ``w / s``, and codes before and after they are clipped."""
    t = tl.div_rn(w, tl.broadcast_to(s, w.shape))
    near = tl.minimum(tl.maximum(t, -_FARTHEST, propagate_nan=_NAN), _FARTHEST, propagate_nan=_NAN)
    r = ((near + _ROUNDING) - _ROUNDING) + z
    q = tl.minimum(tl.maximum(r, 0.0, propagate_nan=_NAN), MAXQ, propagate_nan=_NAN)
    return t, r, q


@triton.jit
def quantized(w, s, z, MAXQ: tl.constexpr):
    """Dequantized weight, fp32, for weights ``[rows, columns]`` and stored scales and zeros ``[rows, 1]``."""
    _, _, q = _codes(w, s, z, MAXQ)
    return (q - z) * s


@triton.jit
def gradient_terms(w, s, z, g, MAXQ: tl.constexpr):
    """The weight's gradient, and what sums to those of the scale and, times the scale, of the zero-point."""
    t, r, q = _codes(w, s, z, MAXQ)
    clipped = r != q
    inside = tl.where(clipped, 0.0, g)
    return inside, g * (q - z - tl.where(clipped, 0.0, t)), inside - g


@triton.jit
def forward_kernel(
    weight,  # fp32 [groups, WIDTH]
    scales,  # fp32 [groups]
    zeros,  # fp32 [groups]
    output,  # any float [groups, WIDTH]
    groups,
    WIDTH: tl.constexpr,
    MAXQ: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SCALE_LOWEST: tl.constexpr,
    SCALE_HIGHEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < groups
    s = stored_scale(tl.load(scales + row, mask=known, other=1.0), SCALE_DTYPE, SCALE_LOWEST, SCALE_HIGHEST)[:, None]
    z = stored_zero(tl.load(zeros + row, mask=known, other=0.0), 0.0, MAXQ)[:, None]
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at = row[:, None] * WIDTH + column[None, :]
        mask = known[:, None] & (column < WIDTH)[None, :]
        w = tl.load(weight + at, mask=mask, other=0.0)
        tl.store(output + at, quantized(w, s, z, MAXQ).to(output.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    weight,  # fp32 [groups, WIDTH]
    scales,  # fp32 [groups]
    zeros,  # fp32 [groups]
    gradient,  # any float [groups, WIDTH]
    d_weight,  # fp32 [groups, WIDTH]
    d_scales,  # fp32 [groups]
    d_zeros,  # fp32 [groups]
    groups,
    WIDTH: tl.constexpr,
    MAXQ: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SCALE_LOWEST: tl.constexpr,
    SCALE_HIGHEST: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_SCALES: tl.constexpr,
    NEED_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < groups
    s = stored_scale(tl.load(scales + row, mask=known, other=1.0), SCALE_DTYPE, SCALE_LOWEST, SCALE_HIGHEST)
    z = stored_zero(tl.load(zeros + row, mask=known, other=0.0), 0.0, MAXQ)
    for_scale = tl.zeros([ROWS], tl.float32)
    for_zero = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at = row[:, None] * WIDTH + column[None, :]
        mask = known[:, None] & (column < WIDTH)[None, :]
        w = tl.load(weight + at, mask=mask, other=0.0)
        g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
        dw, scale_terms, zero_terms = gradient_terms(w, s[:, None], z[:, None], g, MAXQ)
        if NEED_WEIGHT:
            tl.store(d_weight + at, dw, mask=mask)
        for_scale += tl.sum(scale_terms, axis=1)
        for_zero += tl.sum(zero_terms, axis=1)
    if NEED_SCALES:
        tl.store(d_scales + row, for_scale, mask=known)
    if NEED_ZEROS:
        tl.store(d_zeros + row, for_zero * s, mask=known)
