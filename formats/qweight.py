"""The tensors that native and GPTQ checkpoints share.

| tensor  | shape                     | content                                              |
|---------|---------------------------|------------------------------------------------------|
| qweight | int32 ``[words(in), out]``| codes, packed along in_features                      |
| qzeros  | int32 ``[groups, words(out)]`` | zeros, packed along out_features                |
| scales  | float ``[groups, out]``   |                                                      |
| g_idx   | int32 ``[in]``            | group of each input feature                          |
| bias    | float ``[out]``           | optional                                             |

A subclass says how many values a word holds, and how zeros, scales and bias are stored. Sources:
``quantize/int_linear_real.py`` of EfficientQAT, ``nn_modules/qlinear/__init__.py`` of gptqmodel 7.6.0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import PackedFormat
from .errors import CheckpointError, InvalidLayerError
from .packed import PackedLinear
from .packing import pack_bits, packed_length, restream, unpack_bits
from .types import SCALE_DTYPES, QuantScheme, all_equal

__all__ = ["QweightFormat", "config_integer"]

_WORD_BITS = 32


class QweightFormat(PackedFormat):
    """A format with int32 ``qweight`` and ``qzeros``."""

    marker: ClassVar[str] = "qweight"
    local_names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx", "bias")

    @abstractmethod
    def per_word(self, bits: int) -> int | None:
        """Values a word, or None for a dense stream."""

    def stored_scales(self, scales: Tensor) -> Tensor:
        """Scales as written, ``[out, groups]``."""
        return scales

    def stored_bias(self, bias: Tensor) -> Tensor:
        """Bias as written, ``[out]``."""
        return bias

    def stored_zeros(self, zeros: Tensor) -> Tensor:
        """Unpacked qzeros fields from zeros; int32, any shape."""
        return zeros

    def zeros_from_stored(self, fields: Tensor, bits: int) -> Tensor:
        """Inverse of ``stored_zeros`` on the unpacked uint8 fields ``[groups, out]``; int32."""
        return fields.to(torch.int32)

    def encode_packed(self, layer: PackedLinear) -> dict[str, Tensor]:
        """qweight, qzeros, scales, g_idx and, if there is one, bias.

        Raises:
            UnsupportedSchemeError: scales that the stored dtype cannot hold.
        """
        bits, per_word = layer.scheme.bits, self.per_word(layer.scheme.bits)
        fields = self.stored_zeros(layer.zeros).to(torch.uint8)  # [out, groups]
        qzeros = pack_bits(fields, bits, axis=0, per_word=per_word)  # [words, groups]
        used = per_word * bits if per_word else _WORD_BITS
        tensors = {
            "qweight": restream(layer.words, layer.in_features * bits, _WORD_BITS, used),
            "qzeros": qzeros.T.contiguous(),
            "scales": self.stored_scales(layer.scales).T.contiguous(),
            "g_idx": layer.group_index().to(torch.int32),
        }
        if layer.bias is not None:
            tensors["bias"] = self.stored_bias(layer.bias).contiguous()
        return tensors

    def decode_packed(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> PackedLinear:
        """The canonical layer; a g_idx that only counts groups up is dropped.

        Words with unused bits are cleaned: other producers leave garbage there.
        """
        self._check_tensors(tensors, scheme)
        out_features, in_features = self.features(_shapes(tensors), scheme)
        bits, per_word = scheme.bits, self.per_word(scheme.bits)
        used = per_word * bits if per_word else _WORD_BITS
        words = restream(tensors["qweight"], in_features * bits, used, _WORD_BITS)
        fields = unpack_bits(tensors["qzeros"], bits, out_features, axis=1, per_word=per_word)
        zeros = self.zeros_from_stored(fields, bits).T  # [out, groups] int32
        g_idx = _act_order(tensors.get("g_idx"), scheme, in_features)
        symmetric = all_equal(zeros, 2 ** (bits - 1))
        found = QuantScheme(bits, scheme.group_size, sym=symmetric, desc_act=g_idx is not None)
        try:
            return PackedLinear(
                words, tensors["scales"].T, zeros, found, in_features, bias=tensors.get("bias"), g_idx=g_idx
            )
        except InvalidLayerError as exc:
            raise CheckpointError(str(exc)) from exc

    def features(self, shapes: Mapping[str, tuple[int, ...]], scheme: QuantScheme) -> tuple[int, int]:
        """in_features is the length of g_idx, or without one what the words of qweight hold."""
        for name in ("qweight", "qzeros", "scales"):
            if name not in shapes:
                raise CheckpointError(f"no {name}; a layer has qweight, qzeros and scales")
            if len(shapes[name]) != 2:
                raise CheckpointError(f"{name} has shape {list(shapes[name])}; expected two axes")
        rows, out_features = shapes["qweight"]
        if "g_idx" in shapes:
            if len(shapes["g_idx"]) != 1:
                raise CheckpointError(f"g_idx has shape {list(shapes['g_idx'])}; expected [in_features]")
            return out_features, shapes["g_idx"][0]
        per_word = self.per_word(scheme.bits)
        return out_features, rows * per_word if per_word else rows * _WORD_BITS // scheme.bits

    def _check_tensors(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> None:
        out_features, in_features = self.features(_shapes(tensors), scheme)
        per_word, groups = self.per_word(scheme.bits), scheme.groups(max(in_features, 1))
        expected = {
            "qweight": (packed_length(in_features, scheme.bits, per_word=per_word), out_features),
            "qzeros": (groups, packed_length(out_features, scheme.bits, per_word=per_word)),
            "scales": (groups, out_features),
        }
        for name, shape in expected.items():
            tensor = tensors[name]
            allowed = SCALE_DTYPES if name == "scales" else (torch.int32,)
            if tensor.dtype not in allowed:
                names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
                found = str(tensor.dtype).removeprefix("torch.")
                raise CheckpointError(f"{name} is {found}; allowed are {names}")
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{name} has shape {list(tensor.shape)}; {scheme} with {out_features} x {in_features} features "
                    f"takes {list(shape)}"
                )


def config_integer(config: Mapping[str, Any], *keys: str) -> int:
    """The integer under the first of ``keys`` that is present.

    Raises:
        CheckpointError: none is present, or the value is not an integer.
    """
    key = next((key for key in keys if key in config), None)
    if key is None:
        raise CheckpointError(f"the quantization configuration has no {keys[0]}")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"the quantization configuration has {key} = {value!r}; expected an integer")
    return value


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _consecutive_groups(scheme: QuantScheme, in_features: int) -> Tensor:
    return (torch.arange(in_features) // scheme.width(in_features)).to(torch.int32)


def _act_order(g_idx: Tensor | None, scheme: QuantScheme, in_features: int) -> Tensor | None:
    """g_idx as int32 if it reorders groups, else None."""
    if g_idx is None:
        return None
    if g_idx.is_floating_point() or g_idx.is_complex() or g_idx.dtype == torch.bool:
        raise CheckpointError(f"g_idx is {str(g_idx.dtype).removeprefix('torch.')}; expected integers")
    low, high = (int(bound) for bound in g_idx.aminmax())
    groups = scheme.groups(in_features)
    if low < 0 or high >= groups:
        raise CheckpointError(f"g_idx spans {low}..{high}; {groups} groups allow 0..{groups - 1}")
    order = g_idx.to(torch.int32)
    return None if torch.equal(order, _consecutive_groups(scheme, in_features).to(order.device)) else order
