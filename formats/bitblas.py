"""BitBLAS: GPTQ v2's integers by rows, with the fields of each word interleaved for its fp16 kernels.

| tensor | shape | content |
|--------|-------|---------|
| qweight | int8 ``[out, in * bits / 8]`` | codes along in_features; at 2 and 4 bits each 32-bit word interleaved |
| qzeros (or zeros) | int8 ``[groups, out * bits / 8]`` | zeros along out_features, as they are (mode ``quantized``) |
| scales | fp16 ``[out, groups]`` | |
| bias | fp16 ``[out]`` | optional |

Readers, traps and sources: ``bitblas.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import NO_OVERRIDES, Exactness, FormatOption
from .errors import CheckpointError, InvalidLayerError, UnsupportedSchemeError
from .gptqmodel import GptqmodelFormat
from .packed import PackedLinear
from .packing import pack_bits, permute_fields, unpack_bits
from .types import SCALE_DTYPES, GroupedLayer, QuantizedLinear, QuantScheme

__all__ = ["BitblasFormat"]

_BITS = (2, 4, 8)
_GROUPS = (-1, 32, 64, 128)
_STEP = 16
# Field i of a word goes to field _INTERLEAVE[bits][i], so that one mask takes two codes, one for each half of the
# register, at every shift (bitblas 0.1.0.post1, ops/lop3_permutate). 8 bits are not interleaved.
_INTERLEAVE = {
    2: (0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15),
    4: (0, 4, 1, 5, 2, 6, 3, 7),
}


class BitblasFormat(GptqmodelFormat):
    """BitBLAS' own layout (``checkpoint_format: bitblas``); exact when scales are fp16 numbers.

    Args:
        zeros_name: local name of the zeros' tensor, ``"qzeros"`` or ``"zeros"``.
        container_bits: ``"4"``: store codes of fewer bits in fields of this many.
    """

    id: ClassVar[str] = "bitblas"
    title: ClassVar[str] = "BitBLAS, packed as its fp16 kernels take it"
    marker: ClassVar[str] = "qweight"
    local_names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "zeros", "scales", "bias")
    options: ClassVar[tuple[FormatOption, ...]] = (
        FormatOption(
            "zeros-name",
            ("qzeros", "zeros"),
            "qzeros",
            "qzeros for gptqmodel 7.6 and later; zeros for bitblas.Linear, gptqmodel up to 4.2 and vLLM up to 0.15",
        ),
        FormatOption(
            "container-bits",
            ("4",),
            None,
            "store codes of fewer bits in fields of 4 bits, e.g. 3-bit codes",
        ),
    )

    def __init__(self, zeros_name: str = "qzeros", container_bits: str | None = None) -> None:
        self.zeros_name = zeros_name
        self.container_bits = None if container_bits is None else int(container_bits)

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """2, 4 or 8 stored bits, multiples of 16 both ways, groups of 32, 64, 128 or a row, no act-order."""
        stored = self._stored(scheme)
        if scheme.bits > stored.bits:
            raise UnsupportedSchemeError(
                f"{scheme.bits} bits do not fit --container-bits {stored.bits}; leave the option out or use --to native"
            )
        if stored.bits not in _BITS:
            fix = (
                "--container-bits 4 stores the same numbers in wider fields" if scheme.bits < 4 else "take one of those"
            )
            raise UnsupportedSchemeError(f"bitblas holds 2, 4 and 8 bits, not {stored.bits}; {fix}, or use --to native")
        if scheme.desc_act:
            raise UnsupportedSchemeError(
                "bitblas has no act-order (desc_act): its kernels take no g_idx", instead=("gptq",)
            )
        for axis, size in (("in_features", in_features), ("out_features", out_features)):
            if size % _STEP:
                raise UnsupportedSchemeError(
                    f"{axis} is {size}; bitblas at {scheme.bits} bits takes multiples of {_STEP}; "
                    "leave this layer unquantized or use --to native"
                )
        size = scheme.group_size
        if size not in _GROUPS or (size != -1 and in_features % size):
            fitting = [group for group in _GROUPS[:0:-1] if in_features % group == 0]
            raise UnsupportedSchemeError(
                f"group_size is {size}, in_features {in_features}; bitblas takes "
                f"{', '.join(map(str, [*fitting, -1]))} here",
                instead=("gptq",),
            )

    def encode(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        """Packs the codes into the fields that are stored, however few bits they have; see ``encode_packed``."""
        self.check(layer.scheme, layer.out_features, layer.in_features)
        return self._encode(layer, pack_bits(layer.codes, self._stored(layer.scheme).bits, axis=1))

    def encode_packed(self, layer: PackedLinear) -> dict[str, Tensor]:
        """qweight, zeros under their chosen name, scales and, if there is one, bias.

        Raises:
            UnsupportedSchemeError: a scale is beyond fp16's largest number.
        """
        if self._stored(layer.scheme).bits != layer.scheme.bits:
            return self.encode(layer.unpack())
        return self._encode(layer, layer.words.T)

    def _encode(self, layer: GroupedLayer, words: Tensor) -> dict[str, Tensor]:
        """``words`` int32 ``[out, words]``: the stream before its interleave."""
        bits = self._stored(layer.scheme).bits
        if bits in _INTERLEAVE:
            words = permute_fields(words, bits, _INTERLEAVE[bits])
        fields = layer.zeros.T.to(torch.uint8)  # [groups, out]
        tensors = {
            "qweight": words.contiguous().view(torch.int8),
            self.zeros_name: pack_bits(fields, bits, axis=1, container=torch.int8),
            "scales": self.stored_scales(layer.scales).contiguous(),
        }
        if layer.bias is not None:
            tensors["bias"] = self.stored_bias(layer.bias).contiguous()
        return tensors

    def decode_packed(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> PackedLinear:
        """The layer in fields of the stored bits.

        Zeros are taken by either name, packed or (mode ``original``) as numbers. Symmetric files may have none.
        """
        symmetric, scheme = scheme.sym, self._stored(scheme)
        out_features, in_features = self.features(_shapes(tensors), scheme)
        groups = scheme.groups(max(in_features, 1))
        _expect("qweight", tensors["qweight"], (torch.int8,), (out_features, in_features * scheme.bits // 8))
        _expect("scales", tensors["scales"], SCALE_DTYPES, (out_features, groups))
        if in_features % _STEP or out_features % _STEP:
            raise CheckpointError(f"{out_features} x {in_features} features; bitblas has multiples of {_STEP}")
        words = tensors["qweight"].contiguous().view(torch.int32)
        if scheme.bits in _INTERLEAVE:
            words = permute_fields(words, scheme.bits, _inverse(_INTERLEAVE[scheme.bits]))
        zeros = _zeros(tensors, scheme, out_features, groups, symmetric=symmetric)
        found = replace(scheme, sym=bool((zeros == 2 ** (scheme.bits - 1)).all()))
        try:
            return PackedLinear(
                words.T.contiguous(), tensors["scales"], zeros, found, in_features, bias=tensors.get("bias")
            )
        except InvalidLayerError as exc:
            raise CheckpointError(str(exc)) from exc

    def features(self, shapes: Mapping[str, tuple[int, ...]], scheme: QuantScheme) -> tuple[int, int]:
        """Rows of qweight, and the fields that its bytes hold."""
        for name in ("qweight", "scales"):
            if name not in shapes:
                raise CheckpointError(f"no {name}; a layer has qweight, {self.zeros_name} and scales")
            if len(shapes[name]) != 2:
                raise CheckpointError(
                    f"{name} has shape {list(shapes[name])}; expected two axes "
                    "(a qweight of four is tiled for a fixed batch, propagate_b, and is not read)"
                )
        rows, width = shapes["qweight"]
        return rows, width * 8 // self._stored(scheme).bits

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """EXACT_WEIGHTS instead of EXACT in a wider container."""
        plain = super().exactness(layer)
        wider = plain is Exactness.EXACT and self._stored(layer.scheme).bits != layer.scheme.bits
        return Exactness.EXACT_WEIGHTS if wider else plain

    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """GPTQ's keys; ``sym`` is false, since readers of symmetric files take no zeros.

        Raises:
            UnsupportedSchemeError: a layer's stored bits or group_size are not the model's; readers have one of each.
        """
        for name, override in overrides.items():
            if self._stored(override) != self._stored(scheme):
                raise UnsupportedSchemeError(
                    f"layer {name} is {override}, the model {scheme}; readers of bitblas build every layer with the "
                    "model's bits and group_size",
                    instead=("gptq",),
                )
        within = [name for name in ignore if name != "lm_head" or name not in overrides]
        return super().quantization_config(self._stored(scheme), within)

    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """As GPTQ's.

        Raises:
            CheckpointError: as GPTQ's, and for act-order, which BitBLAS does not have.
        """
        scheme = super().parse_config(config)
        if scheme.desc_act and scheme.group_size != -1:
            raise CheckpointError("desc_act is true; a bitblas layer has no g_idx that would say which order is meant")
        return replace(scheme, desc_act=False)

    def _stored(self, scheme: QuantScheme) -> QuantScheme:
        """The scheme that readers see; wider fields make a symmetric layer asymmetric."""
        return QuantScheme(self.container_bits or scheme.bits, scheme.group_size)


def _zeros(
    tensors: Mapping[str, Tensor], scheme: QuantScheme, out_features: int, groups: int, *, symmetric: bool
) -> Tensor:
    """Zeros int32 ``[out, groups]`` from whichever tensor holds them."""
    named = [name for name in ("qzeros", "zeros") if name in tensors and tensors[name].numel()]
    # bitblas keeps signed codes of 1, 2 and 4 bits with 2 ** (bits - 1) added, but those of 8 bits as they are
    if not named and symmetric and scheme.bits in _INTERLEAVE:
        return torch.full((out_features, groups), 2 ** (scheme.bits - 1), dtype=torch.int32)
    if len(named) != 1:
        found = " and ".join(named) or "no zeros"
        raise CheckpointError(f"{found} in a {scheme.bits}-bit layer; it takes either qzeros or zeros")
    name, stored = named[0], tensors[named[0]]
    if not stored.is_floating_point():
        _expect(name, stored, (torch.int8,), (groups, out_features * scheme.bits // 8))
        return unpack_bits(stored, scheme.bits, out_features, axis=1).T.to(torch.int32)
    _expect(name, stored, SCALE_DTYPES, (out_features, groups))
    zeros = stored.to(torch.int32)
    if not torch.equal(zeros.to(stored.dtype), stored) or int(zeros.min()) < 0 or int(zeros.max()) > scheme.maxq:
        raise CheckpointError(
            f"{name} holds {float(stored.min()):g}..{float(stored.max()):g}; expected integers 0..{scheme.maxq} "
            "(zeros times scales, mode rescale, are not read)"
        )
    return zeros


def _expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; allowed are {allowed}")
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")


def _inverse(positions: tuple[int, ...]) -> list[int]:
    return [positions.index(field) for field in range(len(positions))]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
