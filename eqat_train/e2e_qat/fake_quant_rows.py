"""A quantized linear layer in training of which each rank holds some rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from formats import QuantizedLinear

from ..block_ap.fake_quant_linear import FakeQuantLinear
from .row_linear import RowLinear, compute_dtype, linear_of_rows

if TYPE_CHECKING:
    from formats import QuantScheme

    from ..starts import Start

__all__ = ["FakeQuantRows"]


class FakeQuantRows(FakeQuantLinear):
    """Weight, scales and zero-points of this rank's rows; forward computes with those of all.

    A group lies within a row, so quantizing rows, their start and AdamW's step need nothing of other ranks.

    Attributes:
        weight: fp32 parameter ``[own rows, in]``.
        scales: fp32 parameter ``[own rows, groups]``.
        zeros: fp32 parameter ``[own rows, groups]``.
        bias: fp32 parameter ``[out]`` or None.
        rows: which rows they are.
        used: a token has come by since it was last set to False.
    """

    def __init__(
        self,
        linear: RowLinear,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        zero_range: tuple[int, int] | None = None,
        start: Start = "minmax",
        input_power: Tensor | None = None,
    ) -> None:
        super().__init__(linear, scheme, scale_dtype, zero_range, start, input_power)
        self.rows = linear.rows
        self.used = False

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``; every rank calls it, if need be with no tokens."""
        self.used = self.used or x.numel() > 0
        dtype = compute_dtype(x)
        own = self.quantize_dequantize(dtype) if len(self.weight) else self.weight.to(dtype)
        return linear_of_rows(x, own, self.bias, self.rows)

    @torch.no_grad()
    def quantized(self, bias_dtype: torch.dtype = torch.float16) -> QuantizedLinear:
        """The whole layer as it will be stored; every rank calls it."""
        codes, scales, zeros = (self.rows.gather(own).wait() for own in self.stored())
        bias = None if self.bias is None else self.bias.detach().to(bias_dtype)
        return QuantizedLinear(codes, scales, zeros, self.scheme, bias=bias)
