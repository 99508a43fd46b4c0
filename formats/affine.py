"""The one reference formula, ``w = (q - z) * s``, and its inverse.

Everything that turns weights into codes or back goes through here; kernels and runtimes are compared with it.
Rows are split into groups of ``group_size`` input features; a short last group is allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import QuantizedLinear, QuantScheme, by_group

__all__ = ["dequantize", "expand_groups", "minmax_parameters", "quantize", "round_to_nearest"]


def expand_groups(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """Repeats per-group values over their input features: ``[out, groups]`` -> ``[out, in_features]``."""
    width = in_features if group_size == -1 else group_size
    return values.repeat_interleave(width, dim=1)[:, :in_features]


def quantize(weight: Tensor, scales: Tensor, zeros: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes of a weight under given scales and zero-points.

    ``clamp(round(w / s) + z, 0, maxq)`` in fp32, ties to even; zero where the scale is zero.

    Args:
        weight: floating ``[out, in]``.
        scales: floating ``[out, groups]``; the values that will be stored, already rounded to their dtype.
        zeros: integer ``[out, groups]``, 0..maxq.
        scheme: bits and group_size.

    Returns:
        uint8 codes ``[out, in]``.
    """
    columns = weight.shape[1]
    s = expand_groups(scales.float(), columns, scheme.group_size)  # [out, in] fp32
    z = expand_groups(zeros.float(), columns, scheme.group_size)  # [out, in] fp32
    steps = torch.where(s == 0, 0.0, weight.float() / torch.where(s == 0, 1.0, s))
    return (steps.round() + z).clamp(0, scheme.maxq).to(torch.uint8)


def dequantize(layer: QuantizedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight of a layer, ``[out, in]``.

    Codes minus zeros are exact integers; both factors are cast to ``dtype`` and multiplied there, so
    ``dtype=torch.float32`` is the reference and ``torch.float16`` is what fp16 readers compute.
    """
    zeros, scales = layer.zeros.to(dtype), layer.scales.to(dtype)  # [out, groups]
    weight = layer.codes.to(dtype)  # [out, in]; every integer up to 255 is exact in fp16 and bf16 as well
    if layer.g_idx is not None:
        index = layer.group_index()
        return weight.sub_(zeros[:, index]).mul_(scales[:, index])
    for view, groups in by_group(weight, layer.scheme.width(layer.in_features)):
        view.sub_(zeros[:, groups, None]).mul_(scales[:, groups, None])
    return weight


def minmax_parameters(
    weight: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype = torch.float16,
    zero_range: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Asymmetric min-max scales and zero-points, the start of Block-AP (EfficientQAT's quantizer).

    ``s = (max - min) / maxq`` and ``z = clamp(round(-min / s), 0, maxq)`` per group. Scales are kept at
    normal numbers of ``scale_dtype`` so that no group divides by zero.

    Args:
        weight: floating ``[out, in]``.
        scheme: bits and group_size.
        scale_dtype: what the scales will be stored in.
        zero_range: lowest and highest zero-point allowed. A group whose own lies outside gets the nearest, and the
            smallest scale with which all of its weights stay in reach.

    Returns:
        fp32 scales ``[out, groups]`` (not yet rounded to ``scale_dtype``) and int32 zeros ``[out, groups]``.
    """
    rows, columns = weight.shape
    width, groups = scheme.width(columns), scheme.groups(columns)
    values = weight.float()
    short = groups * width - columns
    if short:  # repeat the last column: it changes neither the minimum nor the maximum of its group
        values = torch.cat([values, values[:, -1:].expand(rows, short)], dim=1)
    low, high = values.view(rows, groups, width).aminmax(dim=2)
    limits = torch.finfo(scale_dtype)
    scales = ((high - low) / scheme.maxq).clamp(limits.tiny, limits.max)
    zeros = (-low / scales).round().clamp(0, scheme.maxq)
    if zero_range is not None:
        held = zeros.clamp(*zero_range)
        # a zero at the end of the range leaves nothing on one side: weights there are clamped whatever the scale
        below = torch.where(held > 0, -low / held, 0.0)
        above = torch.where(held < scheme.maxq, high / (scheme.maxq - held), 0.0)
        scales = torch.where(held == zeros, scales, torch.maximum(below, above).clamp(limits.tiny, limits.max))
        zeros = held
    return scales, zeros.to(torch.int32)


def round_to_nearest(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype = torch.float16, bias: Tensor | None = None
) -> QuantizedLinear:
    """Min-max round-to-nearest quantization of a weight ``[out, in]``: the baseline without training."""
    scales, zeros = minmax_parameters(weight, scheme, scale_dtype)
    stored = scales.to(scale_dtype)
    return QuantizedLinear(quantize(weight, stored, zeros, scheme), stored, zeros, scheme, bias=bias)
