"""compressed-tensors, ``pack-quantized``: a dense bit stream along in_features, zero-points packed along out_features.

The library counts from ``-2 ** (bits - 1)`` and adds that much before it packs, to codes and zero-points alike: what is
stored are codes 0..maxq and raw zero-points, so no offset is left to apply. Symmetric layers store no zero-points.
Layout, readers and sources: ``compressed_tensors.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import NO_OVERRIDES, Exactness, FormatOption, PackedFormat
from .compressed_tensors_config import METHOD, config_groups, group_for, model_group, written_config
from .errors import CheckpointError, InvalidLayerError, UnsupportedSchemeError
from .packed import PackedLinear
from .packing import pack_bits, packed_length, restream, unpack_bits
from .rounding import holds_scales, scale_rounding_bound
from .types import QuantizedLinear, QuantScheme

__all__ = ["CompressedTensorsFormat"]

_WORD_BITS = 32
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_USUAL_GROUPS = (128, 64, 32, 16)


class CompressedTensorsFormat(PackedFormat):
    """Every bits 1 to 8, groups that divide in_features; exact when scales are numbers of the stored dtype.

    Args:
        scale_dtype: dtype of stored scales.
    """

    id: ClassVar[str] = METHOD
    title: ClassVar[str] = "compressed-tensors (pack-quantized), the way into vLLM at 2 to 8 bits"
    marker: ClassVar[str] = "weight_packed"
    local_names: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "bias",
    )
    options: ClassVar[tuple[FormatOption, ...]] = (
        FormatOption("scale-dtype", tuple(_DTYPES), "float16", "dtype of scales; float32 holds any scale exactly"),
    )

    def __init__(self, scale_dtype: str = "float16") -> None:
        self.scale_dtype = _DTYPES[scale_dtype]

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """No act-order, a group size that divides in_features, and whole words where there is one group a row."""
        if scheme.desc_act:
            raise UnsupportedSchemeError(
                f"desc_act is set, and readers of {self.id} dropped act-order (compressed-tensors 0.19, vLLM 0.33)",
                instead=("gptq_v2", "native"),
            )
        if scheme.group_size == -1 and in_features * scheme.bits % _WORD_BITS:
            raise UnsupportedSchemeError(
                f"in_features {in_features} at {scheme.bits} bits ends inside a word, which {self.id} reads back only "
                "with groups; leave this layer unquantized or use --to native"
            )
        if scheme.group_size != -1 and in_features % scheme.group_size:
            fitting = [str(size) for size in _USUAL_GROUPS if in_features % size == 0]
            raise UnsupportedSchemeError(
                f"group_size {scheme.group_size} does not divide in_features {in_features}; "
                f"these do: {', '.join([*fitting, '-1'])}; or use --to native"
            )

    def encode_packed(self, layer: PackedLinear) -> dict[str, Tensor]:
        """weight_packed, weight_scale, weight_shape, weight_zero_point unless symmetric, and bias.

        Raises:
            UnsupportedSchemeError: scales that the stored dtype cannot hold.
        """
        tensors = {
            "weight_packed": layer.words.T.contiguous(),  # [out, words]
            "weight_scale": self._stored_scales(layer.scales).contiguous(),
            "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
        }
        if not layer.scheme.sym:
            tensors["weight_zero_point"] = pack_bits(layer.zeros.to(torch.uint8), layer.scheme.bits, axis=0)
        if layer.bias is not None:
            tensors["bias"] = layer.bias.contiguous()
        return tensors

    def decode_packed(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> PackedLinear:
        """The layer as any version of the library stored it; ``sym`` and ``desc_act`` follow the tensors."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        out_features, in_features = self.features(shapes, scheme)
        _check_shape(tensors.get("weight_shape"), out_features, in_features)
        packed = tensors["weight_packed"]
        used = _bits_a_word(packed, in_features, scheme.bits)
        groups = scheme.groups(in_features)
        zeros = _zeros(tensors.get("weight_zero_point"), scheme, out_features, groups, used)
        g_idx = _act_order(tensors.get("weight_g_idx"), scheme, in_features)
        symmetric = bool((zeros == 2 ** (scheme.bits - 1)).all())
        found = QuantScheme(scheme.bits, scheme.group_size, sym=symmetric, desc_act=g_idx is not None)
        try:
            return PackedLinear(
                _stream(packed.T, in_features, scheme.bits, used, "weight_packed").contiguous(),
                tensors["weight_scale"],
                zeros,
                found,
                in_features,
                bias=tensors.get("bias"),
                g_idx=g_idx,
            )
        except InvalidLayerError as exc:
            raise CheckpointError(str(exc)) from exc

    def features(self, shapes: Mapping[str, tuple[int, ...]], scheme: QuantScheme) -> tuple[int, int]:
        """in_features from groups, or from whole words where a row is one group."""
        for name in ("weight_packed", "weight_scale"):
            if len(shapes.get(name, ())) != 2:
                found = f"shape {list(shapes[name])}" if name in shapes else "no tensor"
                raise CheckpointError(f"{name}: {found}; a layer has it with two axes")
        out_features, words = shapes["weight_packed"]
        if scheme.group_size != -1:
            return out_features, shapes["weight_scale"][1] * scheme.group_size
        return out_features, words * _WORD_BITS // scheme.bits

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """EXACT when every scale is a number of the stored dtype."""
        return Exactness.EXACT if holds_scales(layer.scales, self.scale_dtype) else Exactness.ROUNDED

    def exact_option(self) -> str | None:
        """fp32."""
        return None if self.scale_dtype == torch.float32 else "--scale-dtype float32"

    def bound(self, layer: QuantizedLinear) -> Tensor:
        """What rounding scales to their stored dtype does; ``[out, in]``."""
        return scale_rounding_bound(layer, self.scale_dtype)

    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """One config group for the model and one for each scheme that differs."""
        return written_config(scheme, ignore, overrides)

    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """The scheme of the group that targets Linear."""
        return model_group(config_groups(config)).scheme

    def layer_scheme(self, config: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]]) -> QuantScheme:
        """The scheme of the group whose target matches best."""
        return group_for(config_groups(config), config.get("ignore") or (), name).scheme

    def detect(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """quant_method compressed-tensors; what else the library stores is refused by name on opening."""
        return config.get("quant_method") == METHOD

    def model_dtype(self) -> torch.dtype:
        """The dtype of scales: readers dequantize in it, and then cast to the model's."""
        return self.scale_dtype

    def _stored_scales(self, scales: Tensor) -> Tensor:
        stored = scales.to(self.scale_dtype)
        if not torch.isfinite(stored).all():
            raise UnsupportedSchemeError(
                f"a scale is {float(scales.abs().max()):g}, more than {_name(self.scale_dtype)} holds; "
                "use --scale-dtype float32"
            )
        return stored


def _check_shape(stored: Tensor | None, out_features: int, in_features: int) -> None:
    """weight_shape against what the other tensors' shapes say."""
    if stored is not None and stored.flatten().tolist() != [out_features, in_features]:
        raise CheckpointError(
            f"weight_shape is {stored.flatten().tolist()}; the other tensors hold {out_features} x {in_features} values"
        )


def _bits_a_word(words: Tensor, count: int, bits: int) -> int:
    """Bits of the stream in each word, from the length of a packed row of ``count`` values ``[out, words]``.

    Until version 0.17 a word held ``32 // bits`` values, which differs at 3, 5, 6 and 7 bits. Rows of a multiple of 32
    values always tell; some shorter ones take as many words either way and are read as what is written today.
    """
    for used in (_WORD_BITS, _WORD_BITS // bits * bits):
        if words.shape[1] == -(-count * bits // used):
            return used
    raise CheckpointError(
        f"weight_packed has rows of {words.shape[1]} words; {count} values of {bits} bits take "
        f"{packed_length(count, bits)}"
    )


def _stream(words: Tensor, count: int, bits: int, used: int, name: str) -> Tensor:
    """Packed words ``[words, ...]`` of ``count`` values as a dense stream."""
    try:
        return restream(words, count * bits, used, _WORD_BITS)
    except ValueError as exc:
        raise CheckpointError(f"{name}: {exc}") from exc


def _zeros(stored: Tensor | None, scheme: QuantScheme, out_features: int, groups: int, used: int) -> Tensor:
    """Zero-points ``[out, groups]`` int32, 0..maxq.

    Symmetric layers have none. They are packed along out_features, ``used`` bits a word; before version 0.9 they were
    plain signed bytes.
    """
    middle = 2 ** (scheme.bits - 1)
    if stored is None:
        if not scheme.sym:
            raise CheckpointError("no weight_zero_point; the configuration says symmetric: false")
        return torch.full((out_features, groups), middle, dtype=torch.int32)
    if stored.dim() != 2 or stored.shape[1] != groups:
        raise CheckpointError(f"weight_zero_point has shape {list(stored.shape)}; expected {groups} columns")
    if stored.dtype == torch.int8 and stored.shape[0] == out_features:
        zeros = stored.to(torch.int32) + middle
    else:
        stream = _stream(stored, out_features, scheme.bits, used, "weight_zero_point")
        zeros = unpack_bits(stream, scheme.bits, out_features, axis=0).to(torch.int32)
    if scheme.sym and not bool((zeros == middle).all()):
        raise CheckpointError("weight_zero_point moves zero-points although the configuration says symmetric: true")
    return zeros


def _act_order(g_idx: Tensor | None, scheme: QuantScheme, in_features: int) -> Tensor | None:
    """weight_g_idx if it reorders groups; -1 anywhere stands for no order."""
    if g_idx is None or bool((g_idx < 0).any()):
        return None
    consecutive = torch.arange(in_features) // scheme.width(in_features)
    order = g_idx.to(torch.int32)
    return None if torch.equal(order, consecutive.to(torch.int32)) else order


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
