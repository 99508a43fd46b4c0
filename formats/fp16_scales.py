"""What formats share that store scales and biases in fp16, as GPTQ and AWQ do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .affine import dequantize, expand_groups
from .base import Exactness, Format
from .errors import UnsupportedSchemeError
from .packed import PackedLinear
from .types import QuantizedLinear

__all__ = ["Fp16ScalesFormat"]


class Fp16ScalesFormat(Format):
    """Exact when every scale is an fp16 number; otherwise scales are rounded, and so are the weights."""

    def stored_scales(self, scales: Tensor) -> Tensor:
        """fp16.

        Raises:
            UnsupportedSchemeError: a scale is beyond fp16's largest number.
        """
        stored = scales.to(torch.float16)
        if not torch.isfinite(stored).all():
            raise UnsupportedSchemeError(
                f"a scale is {float(scales.abs().max()):g}; {self.id} stores fp16, at most 65504; use --to native"
            )
        return stored

    def stored_bias(self, bias: Tensor) -> Tensor:
        """fp16 where that is exact; otherwise as it is, since readers cast it when they load."""
        stored = bias.to(torch.float16)
        return stored if torch.equal(stored.to(bias.dtype), bias) else bias

    def model_dtype(self) -> torch.dtype:
        """fp16: readers cast scales to the model's dtype, and bf16 would round them."""
        return torch.float16

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """EXACT when every scale is an fp16 number."""
        scales = layer.scales
        exact = scales.dtype == torch.float16 or torch.equal(scales.half().to(scales.dtype), scales)
        return Exactness.EXACT if exact else Exactness.ROUNDED

    def bound(self, layer: QuantizedLinear) -> Tensor:
        """``|fp16(s) - s| * |q - z|``, plus half an ulp of each of the two fp32 products; ``[out, in]``."""
        difference = (layer.scales.double().half().double() - layer.scales.double()).abs()
        if layer.g_idx is None:
            columns = expand_groups(difference, layer.in_features, layer.scheme.group_size)
        else:
            columns = difference[:, layer.group_index()]
        weight = dequantize(layer, torch.float64)
        steps = dequantize(replace(layer, scales=torch.ones_like(layer.scales)), torch.float64).abs()
        rounding = torch.finfo(torch.float32).eps * weight.abs() + torch.finfo(torch.float32).smallest_normal
        limit = steps * columns
        return torch.where(limit == 0, 0.0, limit + rounding).float()
