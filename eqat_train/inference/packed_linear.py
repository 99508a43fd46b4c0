"""A linear layer for inference: the tensors of a native layer as they are stored, and the matmul on them.

Buffers: ``qweight``, ``qzeros`` (int32), ``scales`` in the dtype they are stored in, ``g_idx`` and ``bias`` where there
are such. Nothing is trained; :class:`eqat_train.e2e_qp.quant_linear.QuantLinear` is the layer for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from formats import QuantScheme, get_format
from formats.packed import PackedLinear as StoredLayer
from formats.packing import packed_length
from formats.types import QuantizedLinear

from ..ops.dequant_matmul import dequant_matmul
from ..ops.packed import PackedWeight

__all__ = ["PackedLinear", "native_shapes", "set_impl_"]


class PackedLinear(nn.Module):
    """``y = x @ ((q - z) * s).T + bias`` with a packed ``q`` and ``z``.

    The weight is computed in float32 and rounded once to the dtype of the input. Casting the module (``.to(dtype)``,
    ``.half()``) leaves the scales as they are stored; the bias takes the dtype.

    Args:
        packed: codes and zero-points; their tensors become buffers.
        scales: float16, bfloat16 or float32 ``[groups, out]``.
        bias: floating ``[out]`` or None.
        act_order: whether ``g_idx``, which native checkpoints always have, says more than consecutive groups do.
        impl: see :mod:`eqat_train.ops.dispatch`.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        packed: PackedWeight,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        act_order: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.bits, self.group_size = packed.bits, packed.group_size
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.act_order, self.impl = act_order and packed.g_idx is not None, impl
        self.register_buffer("qweight", packed.qweight)
        self.register_buffer("qzeros", packed.qzeros)
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", packed.g_idx)
        self.register_buffer("bias", bias)

    @classmethod
    def from_layer(
        cls, layer: QuantizedLinear | StoredLayer, *, bias_dtype: torch.dtype | None = None, impl: str = "auto"
    ) -> PackedLinear:
        """A layer of a checkpoint in any format; its bias in ``bias_dtype``, or as it is stored."""
        native = get_format("native")
        tensors = native.encode_packed(layer) if isinstance(layer, StoredLayer) else native.encode(layer)  # type: ignore[attr-defined]
        packed = PackedWeight(
            tensors["qweight"],
            tensors["qzeros"],
            layer.scheme.bits,
            layer.scheme.group_size,
            layer.in_features,
            layer.g_idx,
        )
        bias = tensors.get("bias")
        return cls(packed, tensors["scales"], bias if bias is None else bias.to(bias_dtype), impl=impl)

    @classmethod
    def empty(
        cls,
        scheme: QuantScheme,
        out_features: int,
        in_features: int,
        *,
        scale_dtype: torch.dtype,
        bias_dtype: torch.dtype | None = None,
        g_idx: bool = True,
        act_order: bool = True,
    ) -> PackedLinear:
        """A layer without its numbers, on the current default device, to be filled from a native checkpoint."""
        shapes = native_shapes(scheme, out_features, in_features)
        packed = PackedWeight(
            torch.empty(shapes["qweight"], dtype=torch.int32),
            torch.empty(shapes["qzeros"], dtype=torch.int32),
            scheme.bits,
            scheme.group_size,
            in_features,
            torch.empty(in_features, dtype=torch.int32) if g_idx else None,
        )
        bias = None if bias_dtype is None else torch.empty(out_features, dtype=bias_dtype)
        return cls(packed, torch.empty(shapes["scales"], dtype=scale_dtype), bias, act_order=act_order)

    def packed_weight(self) -> PackedWeight:
        """The codes and zero-points, where the module is."""
        order = self.g_idx if self.act_order else None
        return PackedWeight(self.qweight, self.qzeros, self.bits, self.group_size, self.in_features, order)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]`` in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return dequant_matmul(x, self.packed_weight(), self.scales, bias, impl=self.impl)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # a cast: model.half() must not round what is stored
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        order = ", desc_act=True" if self.act_order else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}{order}"
        )


def native_shapes(scheme: QuantScheme, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a native layer's tensors: see ``formats/native.md``."""
    per_word, groups = 32 // scheme.bits, scheme.groups(in_features)
    return {
        "qweight": (packed_length(in_features, scheme.bits, per_word=per_word), out_features),
        "qzeros": (groups, packed_length(out_features, scheme.bits, per_word=per_word)),
        "scales": (groups, out_features),
    }


def set_impl_(modules: Iterable[nn.Module], impl: str) -> None:
    """Chooses who computes the packed linears among ``modules``: see :mod:`eqat_train.ops.dispatch`."""
    for module in modules:
        if isinstance(module, PackedLinear):
            module.impl = impl
