"""Ordinary dequantized weights: any loader takes them, no codes can be read back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .affine import dequantize
from .base import NO_OVERRIDES, EncodedLayer, Exactness, Format, FormatOption
from .errors import CheckpointError, InputError, UnsupportedSchemeError
from .packed import PackedLinear
from .types import QuantizedLinear, QuantScheme

__all__ = ["DenseFormat"]

_CACHED_WEIGHTS = 2**17
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


class DenseFormat(Format):
    """``weight = (q - z) * s`` computed in fp32 and rounded once to ``dtype``.

    Args:
        dtype: float16, bfloat16 or float32, as a torch dtype or its name.
    """

    id: ClassVar[str] = "dense"
    title: ClassVar[str] = "ordinary dequantized weights, for anything that loads the full-precision model"
    marker: ClassVar[str] = "weight"
    local_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    readable: ClassVar[bool] = False
    options: ClassVar[tuple[FormatOption, ...]] = (
        FormatOption("dtype", tuple(_DTYPES), "float16", "dtype of every tensor in the output"),
    )

    def __init__(self, dtype: torch.dtype | str = torch.float16) -> None:
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise InputError(f"dense dtype is {name!r}; allowed are {', '.join(_DTYPES)}")
        self.dtype = _DTYPES[name]

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """Every scheme and shape is held."""

    def encode(self, layer: QuantizedLinear | PackedLinear) -> EncodedLayer:
        """weight ``[out, in]`` and bias.

        Raises:
            UnsupportedSchemeError: a weight is beyond the dtype's largest number.
        """
        plain = layer.unpack()
        weight, exact = torch.empty(plain.codes.shape, dtype=self.dtype), True
        largest = (plain.scales.float().abs() * torch.maximum(plain.zeros, plain.scheme.maxq - plain.zeros)).max()
        within = float(largest) < torch.finfo(self.dtype).max
        for rows, part in plain.row_blocks(_CACHED_WEIGHTS):
            found = dequantize(part)
            stored = weight[rows].copy_(found)
            if not within and not torch.isfinite(stored).all():
                name = str(self.dtype).removeprefix("torch.")
                raise UnsupportedSchemeError(f"a dequantized weight overflows {name}; use bfloat16 or float32")
            exact = exact and torch.equal(stored.float(), found)
        encoded = EncodedLayer(weight=weight)
        if layer.bias is not None:
            encoded["bias"] = layer.bias.to(self.dtype)
        encoded.exactness = Exactness.EXACT_WEIGHTS if exact else Exactness.ROUNDED
        return encoded

    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedLinear:
        """Never possible."""
        raise CheckpointError("dense weights hold no codes; quantize them with eqat train")

    def features(self, shapes: Mapping[str, tuple[int, ...]], scheme: QuantScheme) -> tuple[int, int]:
        """The weight's shape."""
        match shapes.get("weight"):
            case (out_features, in_features):
                return out_features, in_features
        raise CheckpointError("no two-dimensional weight")

    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """Empty: the checkpoint is not quantized."""
        return {}

    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """Never possible."""
        raise CheckpointError("dense weights have no quantization scheme")

    def model_dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.dtype

    def passthrough_dtype(self) -> torch.dtype:
        """The weights' dtype: the whole model has one."""
        return self.dtype

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """EXACT_WEIGHTS when no weight is rounded."""
        weight = dequantize(layer.unpack())
        exact = torch.equal(weight.to(self.dtype).float(), weight)
        return Exactness.EXACT_WEIGHTS if exact else Exactness.ROUNDED

    def exact_option(self) -> str | None:
        """fp32."""
        return None if self.dtype == torch.float32 else "--dtype float32"

    def bound(self, layer: QuantizedLinear) -> Tensor:
        """Half a unit in the last place of ``dtype`` (round to nearest, IEEE 754); ``[out, in]``."""
        limits = torch.finfo(self.dtype)
        exponent_bits = dequantize(layer).view(torch.int32) & 0x7F800000
        power = exponent_bits.view(torch.float32)  # the power of two at or below each |weight|; 0 for subnormal ones
        return power.mul_(limits.eps / 2).clamp_(min=limits.smallest_normal * limits.eps / 2)
