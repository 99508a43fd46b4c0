"""AWQ in its GEMM layout: 4-bit codes packed along out_features, eight a word in an interleaved order.

Nibble i of a word holds output ``ORDER[i]`` of its eight. Zeros are packed the same way and stored raw. Layout,
readers and sources: ``awq.md``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import NO_OVERRIDES
from .errors import CheckpointError, InvalidLayerError, UnsupportedSchemeError
from .fp16_scales import Fp16ScalesFormat
from .packed import PackedLinear
from .packing import pack_bits, permute_blocks_, unpack_bits
from .qweight import config_integer
from .types import SCALE_DTYPES, QuantizedLinear, QuantScheme

__all__ = ["AwqFormat"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4
_GROUPS = (16, 32, 64, 128)
_PER_WORD = 8
# Index bits of eight words of eight fields, so that field i is word ORDER[i] and word j is field j.
_TRANSPOSED = (4, 5, 3, 0, 1, 2)
_CACHED_WORDS = 2**16


class AwqFormat(Fp16ScalesFormat):
    """qweight and qzeros along out_features, fp16 scales; exact when scales are fp16 numbers."""

    id: ClassVar[str] = "awq"
    title: ClassVar[str] = "AWQ (GEMM layout), 4-bit only"
    marker: ClassVar[str] = "qweight"
    local_names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "bias")
    takes_packed: ClassVar[bool] = True

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """4 bits, consecutive groups that divide in_features, and out_features in eights."""
        if scheme.bits != _BITS:
            raise UnsupportedSchemeError(
                f"awq holds 4 bits, not {scheme.bits}", instead=("compressed-tensors", "gptq_v2")
            )
        if scheme.desc_act:
            raise UnsupportedSchemeError("awq has no g_idx, which desc_act needs", instead=("gptq",))
        if out_features % _PER_WORD:
            raise UnsupportedSchemeError(
                f"out_features is {out_features}; awq at 4 bits takes multiples of {_PER_WORD}; "
                "leave this layer unquantized or use --to native"
            )
        if scheme.group_size not in (*_GROUPS, -1) or in_features % scheme.width(in_features):
            fitting = [str(size) for size in _GROUPS if in_features % size == 0]
            raise UnsupportedSchemeError(
                f"group_size is {scheme.group_size} and in_features {in_features}; awq takes -1, 16, 32, 64 "
                f"and 128 where they divide in_features; these do: {', '.join([*fitting, '-1'])}",
                instead=("gptq_v2",),
            )

    def encode(self, layer: QuantizedLinear | PackedLinear) -> dict[str, Tensor]:
        """qweight, qzeros, scales and, if there is one, bias.

        Raises:
            UnsupportedSchemeError: what ``check`` refuses, or scales that fp16 cannot hold.
        """
        self.check(layer.scheme, layer.out_features, layer.in_features)
        packed = PackedLinear.pack(layer) if isinstance(layer, QuantizedLinear) else layer
        tensors = {
            "qweight": _across(packed.words)[: layer.in_features],
            "qzeros": pack_bits(_interleaved(layer.zeros.to(torch.uint8)), _BITS, axis=0).T.contiguous(),
            "scales": self.stored_scales(layer.scales).T.contiguous(),
        }
        if layer.bias is not None:
            tensors["bias"] = self.stored_bias(layer.bias).contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedLinear:
        """The canonical layer."""
        if scheme.bits != _BITS:
            raise CheckpointError(f"bits is {scheme.bits}; only 4-bit awq is read")
        out_features, in_features = self.features({name: tuple(t.shape) for name, t in tensors.items()}, scheme)
        _check_tensors(tensors, scheme, out_features, in_features)
        codes = _plain(unpack_bits(tensors["qweight"], _BITS, out_features, axis=1))
        zeros = _plain(unpack_bits(tensors["qzeros"], _BITS, out_features, axis=1)).to(torch.int32)
        symmetric = bool((zeros == 2 ** (_BITS - 1)).all())
        found = QuantScheme(_BITS, scheme.group_size, sym=symmetric)
        try:
            return QuantizedLinear(codes, tensors["scales"].T.contiguous(), zeros, found, bias=tensors.get("bias"))
        except InvalidLayerError as exc:
            raise CheckpointError(str(exc)) from exc

    def features(self, shapes: Mapping[str, tuple[int, ...]], scheme: QuantScheme) -> tuple[int, int]:
        """Eight outputs a word of qweight, and its rows."""
        for name in ("qweight", "qzeros", "scales"):
            if len(shapes.get(name, ())) != 2:
                found = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
                raise CheckpointError(f"{name} {found}; a layer has two-dimensional qweight, qzeros and scales")
        in_features, words = shapes["qweight"]
        return words * _PER_WORD, in_features

    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """What AutoAWQ wrote and its readers take.

        Raises:
            UnsupportedSchemeError: a layer whose bits or group_size are not the model's; readers know one of each.
        """
        own = (scheme.bits, scheme.group_size)
        for name, other in overrides.items():
            if (other.bits, other.group_size) != own:
                raise UnsupportedSchemeError(
                    f"layer {name} is {other} in a {scheme} model; awq has one bits and one group_size",
                    instead=("compressed-tensors", "gptq_v2"),
                )
        config: dict[str, Any] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "modules_to_not_convert": list(ignore),
        }
        if "lm_head" not in ignore:  # vLLM and SGLang leave the head in full precision unless told
            config["lm_head"] = True
        # gptqmodel passes over modules_to_not_convert without a word and would read such a module as quantized
        dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in ignore if name != "lm_head"}
        return config | ({"dynamic": dynamic} if dynamic else {})

    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """bits and group_size of a GEMM checkpoint; other layouts are refused by name."""
        version = next((config[key] for key in ("version", "format", "checkpoint_format") if config.get(key)), "gemm")
        if str(version).lower() != "gemm":
            raise CheckpointError(
                f"awq version is {version!r}; only gemm is read, gemv and the others order their words in another way"
            )
        try:
            return QuantScheme(
                config_integer(config, "bits", "w_bit"),
                config_integer(config, "group_size", "q_group_size"),
            )
        except InvalidLayerError as exc:
            raise CheckpointError(f"quantization configuration: {exc}") from exc

    def detect(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """quant_method awq."""
        method = str(config.get("quant_method", config.get("method"))).lower()
        return method == "awq" and any(name.endswith(".qweight") for name in names)


def _across(words: Tensor) -> Tensor:
    """int32 ``[in, out / 8]``, interleaved along out_features, from ``[in / 8, out]`` along in_features.

    Eight words of eight outputs become eight words of eight inputs: a transposition of eights, some rows at a time.
    """
    rows, columns = words.shape
    across = words.new_empty(rows, _PER_WORD, columns // _PER_WORD)
    step = max(1, _CACHED_WORDS // columns)
    for start in range(0, rows, step):
        part = words[start : start + step]
        outputs = part.reshape(-1, _PER_WORD).T.contiguous()  # [8, rows * out / 8]
        inputs = permute_blocks_(outputs, _BITS, _TRANSPOSED)
        across[start : start + step] = inputs.view(_PER_WORD, len(part), -1).transpose(0, 1)
    return across.flatten(0, 1)


def _interleaved(values: Tensor) -> Tensor:
    """Rows reordered within each eight, as they lie in a word; uint8 ``[out, columns]``."""
    return values.unflatten(0, (-1, _PER_WORD))[:, list(ORDER)].flatten(0, 1)


def _plain(values: Tensor) -> Tensor:
    """Unpacked fields ``[rows, out]`` in their own order, transposed; uint8 ``[out, rows]``."""
    inverse = sorted(range(_PER_WORD), key=ORDER.__getitem__)
    return values.T.contiguous().unflatten(0, (-1, _PER_WORD))[:, inverse].flatten(0, 1)


def _check_tensors(tensors: Mapping[str, Tensor], scheme: QuantScheme, out_features: int, in_features: int) -> None:
    if in_features % scheme.width(max(in_features, 1)):
        raise CheckpointError(f"qweight has {in_features} rows, which group_size {scheme.group_size} does not divide")
    groups = scheme.groups(max(in_features, 1))
    expected = {"qzeros": (groups, out_features // _PER_WORD), "scales": (groups, out_features)}
    for name in ("qweight", "qzeros", "scales"):
        allowed = SCALE_DTYPES if name == "scales" else (torch.int32,)
        if tensors[name].dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise CheckpointError(f"{name} is {str(tensors[name].dtype).removeprefix('torch.')}; allowed are {names}")
        if name in expected and tuple(tensors[name].shape) != expected[name]:
            raise CheckpointError(
                f"{name} has shape {list(tensors[name].shape)}; {scheme} with {out_features} x {in_features} features "
                f"takes {list(expected[name])}"
            )
