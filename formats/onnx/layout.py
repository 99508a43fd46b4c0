"""The tensors of one ``com.microsoft.MatMulNBits`` node.

| tensor      | shape                                 | content                                           |
|-------------|---------------------------------------|---------------------------------------------------|
| B           | uint8 ``[out, blocks, block*bits/8]`` | codes along in_features, low bits first           |
| scales      | float ``[out, blocks]``               | in the graph's dtype                              |
| zero_points | uint8 ``[out, ceil(blocks*bits/8)]``  | zeros along the blocks, whole bytes a row         |
| bias        | float ``[out]``                       | optional, as it was                               |

A block is a group, or an equal part of one with the same scale and zero: onnxruntime takes powers of two from 16, and
its CPU kernels at most 256.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import NO_OVERRIDES, Exactness, FormatOption, PackedFormat
from ..errors import CheckpointError, InputError, InvalidLayerError, UnsupportedSchemeError
from ..packed import PackedLinear
from ..packing import pack_bits, packed_length, unpack_bits
from ..qweight import config_integer
from ..rounding import holds_scales, scale_rounding_bound
from ..types import SCALE_DTYPES, GroupedLayer, QuantizedLinear, QuantScheme

__all__ = ["DTYPES", "OnnxLayout", "block_size"]

DTYPES = {"float32": torch.float32, "float16": torch.float16}
ACCURACY_LEVELS = ("0", "1", "4")
_BITS = (2, 4, 8)
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256


class OnnxLayout(PackedFormat):
    """MatMulNBits in an ONNX graph; exact when scales are numbers of ``scale_dtype``, as they always are of float32.

    Args:
        scale_dtype: dtype of the scales, and with them of all activations: ``"float32"`` or ``"float16"``.
        container_bits: ``"4"`` or ``"8"``: store codes of fewer bits in fields of this many.
        accuracy_level: the nodes' attribute: ``"0"`` and ``"1"`` compute as the graph says, ``"4"`` rounds activations
            to 8-bit integers on the way.
    """

    id: ClassVar[str] = "onnx"
    title: ClassVar[str] = "ONNX Runtime, a graph of the whole model with MatMulNBits"
    marker: ClassVar[str] = "B"
    local_names: ClassVar[tuple[str, ...]] = ("B", "scales", "zero_points", "bias")
    options: ClassVar[tuple[FormatOption, ...]] = (
        FormatOption("scale-dtype", tuple(DTYPES), "float32", "dtype of scales and activations; float16 for GPUs"),
        FormatOption(
            "container-bits", ("4", "8"), None, "bits of a stored field, when the codes have fewer (3-bit codes fit 4)"
        ),
        FormatOption(
            "accuracy-level", ACCURACY_LEVELS, "0", "4 lets kernels round activations to int8: fast on CPUs, inexact"
        ),
    )

    def __init__(
        self, scale_dtype: str = "float32", container_bits: str | None = None, accuracy_level: str = "0"
    ) -> None:
        if scale_dtype not in DTYPES:
            raise InputError(f"scale-dtype is {scale_dtype!r}; allowed are {', '.join(DTYPES)}")
        self.scale_dtype = DTYPES[scale_dtype]
        self.container_bits = None if container_bits is None else int(container_bits)
        self.accuracy_level = int(accuracy_level)

    def stored_bits(self, bits: int) -> int:
        """Bits of a stored field."""
        return bits if self.container_bits is None else self.container_bits

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """2, 4 or 8 stored bits, in_features and groups that are multiples of 16, no act-order."""
        stored = self.stored_bits(scheme.bits)
        if scheme.bits > stored:
            raise UnsupportedSchemeError(
                f"{scheme.bits} bits do not fit --container-bits {stored}; leave the option out or take 8"
            )
        if stored not in _BITS:
            fitting = 4 if stored < 4 else 8
            raise UnsupportedSchemeError(
                f"onnxruntime computes with 2, 4 and 8 bits, not {stored}; --container-bits {fitting} stores the same "
                "numbers in wider fields",
                instead=("gptq",),
            )
        if scheme.desc_act:
            raise UnsupportedSchemeError(
                "onnx has no act-order (desc_act): g_idx is deprecated in onnxruntime", instead=("gptq",)
            )
        if scheme.group_size != -1 and scheme.group_size % _SMALLEST_BLOCK:
            raise UnsupportedSchemeError(
                f"group_size is {scheme.group_size}; onnx takes multiples of {_SMALLEST_BLOCK}; use --to native"
            )
        if in_features % _SMALLEST_BLOCK:
            raise UnsupportedSchemeError(
                f"in_features is {in_features}; onnx takes multiples of {_SMALLEST_BLOCK}; "
                "leave this layer unquantized or use --to native"
            )

    def encode(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        """Packs the codes into the fields that are stored, however few bits they have; see ``encode_packed``."""
        self.check(layer.scheme, layer.out_features, layer.in_features)
        return self._encode(layer, pack_bits(layer.codes, self.stored_bits(layer.scheme.bits), axis=1))

    def encode_packed(self, layer: PackedLinear) -> dict[str, Tensor]:
        """B, scales, zero_points and, if there is one, bias.

        Raises:
            UnsupportedSchemeError: a scale is beyond the largest number of ``scale_dtype``.
        """
        if self.stored_bits(layer.scheme.bits) != layer.scheme.bits:
            return self.encode(layer.unpack())
        return self._encode(layer, layer.words.T)

    def _encode(self, layer: GroupedLayer, words: Tensor) -> dict[str, Tensor]:
        """``words`` int32 ``[out, words]``: the stream of stored fields."""
        bits = self.stored_bits(layer.scheme.bits)
        size = block_size(layer.scheme, layer.in_features)
        stream = words.contiguous().view(torch.uint8)  # [out, in*bits/8]
        parts = _parts(layer.scheme, layer.in_features, size)
        zeros = layer.zeros.to(torch.uint8)
        tensors = {
            "B": stream.view(layer.out_features, -1, size * bits // 8),
            "scales": _spread(self._stored_scales(layer.scales), parts),
            "zero_points": _packed_zeros(_spread(zeros, parts), bits),
        }
        if layer.bias is not None:
            tensors["bias"] = layer.bias.contiguous()
        return tensors

    def decode_packed(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> PackedLinear:
        """The layer in codes of ``scheme.bits``; without zero_points every zero is ``2 ** (stored bits - 1)``."""
        out_features, in_features = self.features(_shapes(tensors), scheme)
        bits, size = self.stored_bits(scheme.bits), block_size(scheme, in_features)
        blocks = in_features // size
        _expect("B", tensors["B"], (torch.uint8,), (out_features, blocks, size * bits // 8))
        _expect("scales", tensors["scales"], SCALE_DTYPES, (out_features, blocks))
        words = tensors["B"].reshape(out_features, -1).view(torch.int32)
        if bits != scheme.bits:
            codes = unpack_bits(words, bits, in_features, axis=1)
            if int(codes.max()) > scheme.maxq:
                raise CheckpointError(f"B holds the code {int(codes.max())}; {scheme.bits} bits end at {scheme.maxq}")
            words = pack_bits(codes, scheme.bits, axis=1)
        fields = self._fields(tensors.get("zero_points"), bits, out_features, blocks)
        parts = _parts(scheme, in_features, size)
        zeros = _gather(fields, parts, "zero_points").to(torch.int32)
        found = replace(scheme, sym=bool((zeros == 2 ** (scheme.bits - 1)).all()), desc_act=False)
        try:
            return PackedLinear(
                words.T.contiguous(),
                _gather(tensors["scales"], parts, "scales"),
                zeros,
                found,
                in_features,
                bias=tensors.get("bias"),
            )
        except InvalidLayerError as exc:
            raise CheckpointError(str(exc)) from exc

    def features(self, shapes: Mapping[str, tuple[int, ...]], scheme: QuantScheme) -> tuple[int, int]:
        """Rows of B, and the fields that the bytes of a row hold."""
        for name, axes in (("B", 3), ("scales", 2)):
            if name not in shapes:
                raise CheckpointError(f"no {name}; a layer has B, scales and zero_points")
            if len(shapes[name]) != axes:
                raise CheckpointError(f"{name} has shape {list(shapes[name])}; expected {axes} axes")
        out_features, blocks, width = shapes["B"]
        return out_features, blocks * width * 8 // self.stored_bits(scheme.bits)

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """EXACT when every scale is a number of ``scale_dtype``."""
        return Exactness.EXACT if holds_scales(layer.scales, self.scale_dtype) else Exactness.ROUNDED

    def exact_option(self) -> str | None:
        """fp32."""
        return None if self.scale_dtype == torch.float32 else "--scale-dtype float32"

    def bound(self, layer: QuantizedLinear) -> Tensor:
        """See ``scale_rounding_bound``."""
        return scale_rounding_bound(layer, self.scale_dtype)

    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """Ours alone: onnxruntime reads the graph, which does not tell codes of 3 bits in fields of 4."""
        config: dict[str, Any] = {
            "quant_method": self.id,
            **asdict(scheme),
            "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
            "accuracy_level": self.accuracy_level,
            "modules_to_not_convert": list(ignore),
        }
        if self.container_bits is not None:
            config["container_bits"] = self.container_bits
        if overrides:
            config["overrides"] = {name: asdict(override) for name, override in overrides.items()}
        return config

    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """bits, group_size and sym."""
        return _scheme(config)

    def layer_scheme(self, config: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]]) -> QuantScheme:
        """The layer's entry in ``overrides``, or the model-wide scheme."""
        overrides = config.get("overrides") or {}
        return _scheme(overrides[name] if name in overrides else config)

    def configured(self, config: Mapping[str, Any]) -> OnnxLayout:
        """With the options that the file was written with."""
        container = config.get("container_bits")
        level = str(config.get("accuracy_level", 0))
        if container not in (None, *_BITS) or level not in ACCURACY_LEVELS:
            raise CheckpointError(
                f"container_bits is {container!r}, accuracy_level {level}; expected 4 or 8, and 0 to 4"
            )
        return type(self)(config.get("scale_dtype", "float32"), container and str(container), level)

    def detect(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By its quant_method."""
        return config.get("quant_method") == self.id

    def _stored_scales(self, scales: Tensor) -> Tensor:
        stored = scales.to(self.scale_dtype)
        if not torch.isfinite(stored).all():
            raise UnsupportedSchemeError(
                f"a scale is {float(scales.abs().max()):g}; float16 ends at 65504; use --scale-dtype float32"
            )
        return stored

    def _fields(self, zero_points: Tensor | None, bits: int, out_features: int, blocks: int) -> Tensor:
        """Unpacked zeros, uint8 ``[out, blocks]``."""
        if zero_points is None:
            return torch.full((out_features, blocks), 2 ** (bits - 1), dtype=torch.uint8)
        width = packed_length(blocks, bits, torch.uint8)
        _expect("zero_points", zero_points, (torch.uint8,), (out_features, width))
        return unpack_bits(zero_points, bits, blocks, axis=1)


def block_size(scheme: QuantScheme, in_features: int) -> int:
    """Input features of a stored block: the largest power of two that divides both group and row, at most 256."""
    common = math.gcd(scheme.width(in_features), in_features)
    return min(common & -common, _LARGEST_BLOCK)


def _parts(scheme: QuantScheme, in_features: int, size: int) -> Tensor | None:
    """Group of each block, int64 ``[blocks]``; None where a block is a group."""
    width = scheme.width(in_features)
    return None if width == size else torch.arange(in_features // size) * size // width


def _spread(values: Tensor, parts: Tensor | None) -> Tensor:
    """``[out, groups]`` to ``[out, blocks]``."""
    return values.contiguous() if parts is None else values[:, parts]


def _packed_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Spare fields of a row's last byte hold the middle, as onnxruntime's packer leaves them."""
    spare = -zeros.shape[1] % (8 // bits)
    return pack_bits(torch.nn.functional.pad(zeros, (0, spare), value=2 ** (bits - 1)), bits, 1, container=torch.uint8)


def _gather(values: Tensor, parts: Tensor | None, name: str) -> Tensor:
    """``[out, blocks]`` to ``[out, groups]``.

    Raises:
        CheckpointError: blocks of one group differ.
    """
    if parts is None:
        return values
    first = torch.searchsorted(parts, torch.arange(int(parts[-1]) + 1))
    groups = values[:, first]
    if not torch.equal(groups[:, parts], values):
        raise CheckpointError(f"{name} differ between blocks of one group; the group_size of config.json is wrong")
    return groups


def _scheme(config: Mapping[str, Any]) -> QuantScheme:
    try:
        return QuantScheme(
            config_integer(config, "bits"), config_integer(config, "group_size"), sym=bool(config.get("sym"))
        )
    except InvalidLayerError as exc:
        raise CheckpointError(f"the quantization configuration is wrong: {exc}") from exc


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} is {found} {list(tensor.shape)}; expected {allowed} {list(shape)}")
