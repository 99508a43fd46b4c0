"""Fake quantization in plain torch.

With ``t = w / s``, ``r = round(t) + z`` and ``m = 1`` where ``0 <= r <= maxq``, else 0, the forward is
``w_hat = (clamp(r, 0, maxq) - z) * s`` and, for an incoming gradient ``g``,

    dw = g * m
    ds = sum over the group of  g * (clamp(r, 0, maxq) - z - m * t)
    dz = sum over the group of  g * (m - 1) * s

Codes are recomputed in the backward pass: nothing of the weight's size is kept but the weight itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fake_quant", "gradients", "stored_scales", "stored_zeros"]


def stored_scales(scales: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Scales as stored: kept at positive normal numbers of ``scale_dtype`` and rounded to it."""
    limits = torch.finfo(scale_dtype)
    return scales.clamp(limits.tiny, limits.max).to(scale_dtype)


def stored_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero-points as stored: fp32 integers 0..maxq, ties to even."""
    return zeros.round().clamp(0, 2**bits - 1)


def gradients(weight: Tensor, s: Tensor, z: Tensor, bits: int, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, scales and zeros, given stored scales and zeros ``[out, groups]`` in fp32."""
    t = weight.reshape(*s.shape, -1) / s.unsqueeze(2)  # [out, groups, width] fp32
    g = gradient.float().reshape(t.shape)
    r = t.round().add_(z.unsqueeze(2))
    q = r.clamp(0, 2**bits - 1)
    clipped = r != q
    inside = g.masked_fill(clipped, 0)  # g * m
    d_zeros = (inside - g).sum(dim=2).mul_(s)
    t.masked_fill_(clipped, 0)  # not times m: t is infinite where a scale vanishes
    d_scales = q.sub_(z.unsqueeze(2)).sub_(t).mul_(g).sum(dim=2)
    return inside.view_as(weight), d_scales, d_zeros


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bits: int,
        width: int,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        s = stored_scales(scales, scale_dtype).float()  # [out, groups] fp32
        z = stored_zeros(zeros, bits)
        ctx.save_for_backward(weight, s, z)
        ctx.bits = bits
        w = weight.reshape(*s.shape, width)  # [out, groups, width]
        s, z = s.unsqueeze(2), z.unsqueeze(2)
        return (w / s).round_().add_(z).clamp_(0, 2**bits - 1).sub_(z).mul_(s).view_as(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, s, z = ctx.saved_tensors
        results = gradients(weight, s, z, ctx.bits, grads[0])
        needed = (result if need else None for result, need in zip(results, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None, None


def fake_quant(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    width: int,
    scale_dtype: torch.dtype,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See :func:`eqat_train.ops.fake_quant.fake_quant`; ``width`` is the group's width, never -1."""
    result: Tensor = _FakeQuant.apply(weight, scales, zeros, bits, width, scale_dtype, dtype)
    return result
