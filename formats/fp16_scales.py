"""What formats share that store scales and biases in fp16, as GPTQ and AWQ do."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Exactness, Format
from .errors import UnsupportedSchemeError
from .packed import PackedLinear
from .rounding import holds_scales, scale_rounding_bound
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
        return Exactness.EXACT if holds_scales(layer.scales, torch.float16) else Exactness.ROUNDED

    def bound(self, layer: QuantizedLinear) -> Tensor:
        """What rounding scales to fp16 does; ``[out, in]``."""
        return scale_rounding_bound(layer, torch.float16)
