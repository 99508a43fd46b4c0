"""A linear layer whose weight stays packed and whose scales are trained.

Buffers ``qweight``, ``qzeros`` (int32, native layout), ``g_idx`` (act-order only) and ``bias`` never change. The only
parameter is ``scales``, a float32 master in the native orientation ``[groups, out]``; forward rounds it
straight-through to ``scale_dtype``, so the layer computes with the very scales that will be stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from formats import QuantizedLinear, get_format
from formats.errors import InvalidLayerError
from formats.types import SCALE_DTYPES

from ..ops.dequant_matmul import dequant_matmul
from ..ops.dequant_matmul.autograd import trained_gated_linear, trained_linears
from ..ops.packed import PackedWeight
from ..ops.straight_through import round_to_dtype

__all__ = ["QuantLinear"]


class QuantLinear(nn.Module):
    """``y = x @ ((q - z) * s).T + bias`` with a packed ``q`` and ``z``.

    The weight is computed in float32 and rounded once to the dtype of the input (under autocast: to autocast's dtype),
    in which the matmul runs; the scales' gradient is float32. Move the module with ``.to(device)`` only: the master
    scales are not meant for a shorter dtype.

    Args:
        packed: codes and zero-points; their tensors become buffers.
        scales: floating ``[groups, out]``.
        scale_dtype: float16, bfloat16 or float32, what the scales will be stored in.
        bias: floating ``[out]`` or None.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Raises:
        InvalidLayerError: ``scale_dtype`` is none of the three.
    """

    qweight: Tensor
    qzeros: Tensor
    bias: Tensor | None
    g_idx: Tensor | None

    def __init__(
        self,
        packed: PackedWeight,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        scale_dtype: torch.dtype = torch.float16,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if scale_dtype not in SCALE_DTYPES:
            raise InvalidLayerError(f"scale_dtype is {scale_dtype}; allowed are float16, bfloat16, float32")
        self.bits, self.group_size = packed.bits, packed.group_size
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.scale_dtype, self.impl = scale_dtype, impl
        self.shared: PackedWeight | None = None
        self.register_buffer("qweight", packed.qweight)
        self.register_buffer("qzeros", packed.qzeros)
        self.register_buffer("bias", bias)
        self.register_buffer("g_idx", packed.g_idx)
        self.scales = nn.Parameter(scales.detach().to(torch.float32, copy=True).contiguous())

    @classmethod
    def from_layer(
        cls, layer: QuantizedLinear, *, scale_dtype: torch.dtype = torch.float16, impl: str = "auto"
    ) -> QuantLinear:
        """Packs a canonical layer."""
        tensors = get_format("native").encode(layer)
        packed = PackedWeight(
            tensors["qweight"],
            tensors["qzeros"],
            layer.scheme.bits,
            layer.scheme.group_size,
            layer.in_features,
            layer.g_idx,
        )
        return cls(packed, layer.scales.t(), layer.bias, scale_dtype=scale_dtype, impl=impl)

    def packed_weight(self) -> PackedWeight:
        """The codes and zero-points, where the module is; gathered when they are looked at where ranks share them."""
        if self.shared is not None:
            return self.shared
        return PackedWeight(self.qweight, self.qzeros, self.bits, self.group_size, self.in_features, self.g_idx)

    def stored_scales(self) -> Tensor:
        """The scales as they are stored and as forward uses them: ``scale_dtype`` ``[groups, out]``, detached."""
        return self.scales.detach().to(self.scale_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]`` in the dtype of ``x``, or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        scales = round_to_dtype(self.scales, self.scale_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return dequant_matmul(x, self.packed_weight(), scales, bias, impl=self.impl)

    @staticmethod
    def together(linears: Sequence[QuantLinear], x: Tensor) -> list[Tensor]:
        """The outputs of several layers of one input, whose gradient their products add up; not under autocast."""
        layers = [
            (
                linear.packed_weight(),
                round_to_dtype(linear.scales, linear.scale_dtype),
                None if linear.bias is None else linear.bias.to(x.dtype),
            )
            for linear in linears
        ]
        return trained_linears(x, layers, linears[0].impl)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The layer's output for ``silu(gate) * up``, which training does not keep.

        Args:
            gate: ``[..., in]``.
            up: of the shape and dtype of ``gate``.

        Returns:
            ``[..., out]`` in the dtype of ``gate``; not under autocast.
        """
        scales = round_to_dtype(self.scales, self.scale_dtype)
        bias = None if self.bias is None else self.bias.to(gate.dtype)
        return trained_gated_linear(gate, up, self.packed_weight(), scales, bias, self.impl)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        order = ", desc_act=True" if self.g_idx is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}{order}"
        )
