"""The linear layer that Block-AP trains: full-precision weight, learned scales and zero-points, fake-quant forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formats import QuantizedLinear, QuantScheme, quantize

from ..ops.fake_quant import fake_quant, stored_scales, stored_zeros
from ..starts import Start, start_parameters

__all__ = ["FakeQuantLinear"]


class FakeQuantLinear(nn.Module):
    """A linear layer whose forward uses the weight as it will be stored.

    Attributes:
        weight: fp32 parameter ``[out, in]``, the given tensor itself.
        scales: fp32 parameter ``[out, groups]``, from the start.
        zeros: fp32 parameter ``[out, groups]``.
        bias: fp32 parameter ``[out]`` or None.
        dequantized: what the forward multiplies with when someone else keeps it up to date, ``[out, in]`` in the
            compute dtype; None to make it anew from the parameters in every forward.
        impl: who computes it, see :mod:`eqat_train.ops.dispatch`.

    Args:
        linear: full-precision layer, fp32.
        scheme: bits and group_size.
        scale_dtype: dtype in which scales are stored.
        zero_range: lowest and highest zero-point that is ever used; None for all of them.
        start: see :mod:`eqat_train.starts`.
        input_power: mean square of each input ``[in]``, for the start ``activations``.
    """

    def __init__(
        self,
        linear: nn.Linear,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        zero_range: tuple[int, int] | None = None,
        start: Start = "minmax",
        input_power: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme, self.scale_dtype, self.zero_range = scheme, scale_dtype, zero_range
        weight = linear.weight.detach()
        scales, zeros = start_parameters(weight, scheme, scale_dtype, zero_range, start, input_power)
        self.weight = nn.Parameter(weight)
        self.scales = nn.Parameter(scales)
        self.zeros = nn.Parameter(zeros)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach())
        self.dequantized: Tensor | None = None
        self.impl = "auto"

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        weight = self.dequantized
        if weight is None:
            device = x.device.type
            weight = self.quantize_dequantize(
                torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
            )
        return F.linear(x, weight, self.bias)

    def quantize_dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as it will be stored, rounded to ``dtype`` once; differentiable in every parameter."""
        return fake_quant(
            self.weight,
            self.scales,
            self._held_zeros(),
            self.scheme.bits,
            self.scheme.group_size,
            self.scale_dtype,
            dtype,
            impl=self.impl,
        )

    @torch.no_grad()
    def quantized(self, bias_dtype: torch.dtype = torch.float16) -> QuantizedLinear:
        """The layer as it will be stored: the very codes, scales and zeros that the forward uses."""
        bias = None if self.bias is None else self.bias.detach().to(bias_dtype)
        return QuantizedLinear(*self.stored(), self.scheme, bias=bias)

    @torch.no_grad()
    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``[out, in]``, scales and zeros ``[out, groups]`` as they will be stored."""
        scales = stored_scales(self.scales, self.scale_dtype)
        zeros = stored_zeros(self._held_zeros(), self.scheme.bits).to(torch.int32)
        return quantize(self.weight, scales, zeros, self.scheme), scales, zeros

    def _held_zeros(self) -> Tensor:
        """Zeros within the allowed range, straight through: at its ends a zero still feels which way it should go."""
        if self.zero_range is None:
            return self.zeros
        return self.zeros + (self.zeros.clamp(*self.zero_range) - self.zeros).detach()
