"""What storing scales in another dtype does to the weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .affine import dequantize
from .types import QuantizedLinear

__all__ = ["holds_scales", "scale_rounding_bound"]


def holds_scales(scales: Tensor, dtype: torch.dtype) -> bool:
    """True when every scale is a number of ``dtype``."""
    return torch.promote_types(scales.dtype, dtype) == dtype or torch.equal(scales.to(dtype).to(scales.dtype), scales)


def scale_rounding_bound(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """``|dtype(s) - s| * |q - z|``, plus half an ulp of each of the two fp32 products; fp32 ``[out, in]``."""
    exact = layer.scales.double()
    columns = (layer.scales.to(dtype).double() - exact).abs()[:, layer.group_index()]
    weight = dequantize(layer, torch.float64)
    steps = dequantize(replace(layer, scales=torch.ones_like(layer.scales)), torch.float64).abs()
    rounding = torch.finfo(torch.float32).eps * weight.abs() + torch.finfo(torch.float32).smallest_normal
    limit = steps * columns
    return torch.where(limit == 0, 0.0, limit + rounding).float()
