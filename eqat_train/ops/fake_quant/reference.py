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

__all__ = ["fake_quant", "stored_scales", "stored_zeros"]


def stored_scales(scales: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Scales as stored: kept at positive normal numbers of ``scale_dtype`` and rounded to it."""
    limits = torch.finfo(scale_dtype)
    return scales.clamp(limits.tiny, limits.max).to(scale_dtype)


def stored_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero-points as stored: fp32 integers 0..maxq, ties to even."""
    return zeros.round().clamp(0, 2**bits - 1)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, width: int, scale_dtype: torch.dtype
    ) -> Tensor:
        s = stored_scales(scales, scale_dtype).float().unsqueeze(2)  # [out, groups, 1] fp32
        z = stored_zeros(zeros, bits).unsqueeze(2)
        ctx.save_for_backward(weight, s, z)
        ctx.bits = bits
        w = weight.reshape(weight.shape[0], -1, width)  # [out, groups, width]
        return (w / s).round_().add_(z).clamp_(0, 2**bits - 1).sub_(z).mul_(s).view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, s, z = ctx.saved_tensors
        t = weight.reshape(*s.shape[:2], -1) / s  # [out, groups, width] fp32
        g = grads[0].reshape(t.shape)
        r = t.round().add_(z)
        q = r.clamp(0, 2**ctx.bits - 1)
        clipped = r != q
        inside = g.masked_fill(clipped, 0)  # g * m
        need_weight, need_scales, need_zeros = ctx.needs_input_grad[:3]
        d_scales = d_zeros = None
        if need_zeros:
            d_zeros = (inside - g).sum(dim=2).mul_(s.squeeze(2))
        if need_scales:
            t.masked_fill_(clipped, 0)  # not times m: t is infinite where a scale vanishes
            d_scales = q.sub_(z).sub_(t).mul_(g).sum(dim=2)
        return inside.view_as(weight) if need_weight else None, d_scales, d_zeros, None, None, None


def fake_quant(
    weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, width: int, scale_dtype: torch.dtype
) -> Tensor:
    """See :func:`eqat_train.ops.fake_quant.fake_quant`; ``width`` is the group's width, never -1."""
    result: Tensor = _FakeQuant.apply(weight, scales, zeros, bits, width, scale_dtype)
    return result
