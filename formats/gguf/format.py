"""GGUF as a format: one layer as ggml blocks and back. Layout, traps, readers and sources: ``gguf.md``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..affine import dequantize, expand_groups
from ..base import NO_OVERRIDES, EncodedLayer, Exactness, Format, FormatOption
from ..container import ModelReader, ModelWriter, SourceModel
from ..errors import CheckpointError, InputError, InvalidLayerError, UnsupportedSchemeError
from ..packed import PackedLinear
from ..pieces import Pieces
from ..qweight import config_integer
from ..rounding import holds_scales
from ..types import QuantizedLinear, QuantScheme, negated
from ..version import __version__
from .blocks import BLOCK_TYPES, UNIT, WRITABLE, BlockType, block_type_of, pack_blocks, stream_blocks, unpack_blocks
from .decoding import decode_blocks, regroup
from .fitting import TypeChoice, choose, fit, integers, refusal, within
from .header import is_gguf
from .pre_tokenizers import NAMES as PRE_TOKENIZERS

__all__ = ["EncodedBlocks", "GgufFormat"]

AUTO = "auto"


class EncodedBlocks(EncodedLayer):
    """A layer's tensors, and why its blocks have their type."""

    def __init__(self, tensors: Mapping[str, Tensor], choice: TypeChoice) -> None:
        super().__init__(tensors)
        self.choice = choice


class GgufFormat(Format):
    """One ``.gguf`` file with Q2_0, Q4_0, Q5_0 and Q8_0 blocks made directly from codes.

    Args:
        gguf_type: block type of every quantized tensor; "auto" takes the smallest that is exact, tensor by tensor.
        pre_tokenizer: llama.cpp's name of the tokenizer's pre-tokenizer; None recognises it.
    """

    id: ClassVar[str] = "gguf"
    title: ClassVar[str] = "GGUF for llama.cpp, Ollama and LM Studio"
    marker: ClassVar[str] = "blocks"
    local_names: ClassVar[tuple[str, ...]] = ("blocks", "bias")
    takes_packed: ClassVar[bool] = True
    suffix: ClassVar[str] = ".gguf"
    options: ClassVar[tuple[FormatOption, ...]] = (
        FormatOption(
            "gguf-type",
            (AUTO, *(kind.name for kind in WRITABLE)),
            AUTO,
            "block type of every layer; auto takes each layer's smallest exact one, a forced one rounds to its range",
        ),
        FormatOption(
            "pre-tokenizer",
            (),
            None,
            f"how the tokenizer splits text, if that is not recognised: {', '.join(PRE_TOKENIZERS)}",
        ),
    )

    def __init__(self, gguf_type: str = AUTO, pre_tokenizer: str | None = None) -> None:
        if gguf_type != AUTO and gguf_type not in {kind.name for kind in WRITABLE}:
            allowed = ", ".join((AUTO, *(kind.name for kind in WRITABLE)))
            raise InputError(f"gguf-type is {gguf_type!r}; allowed are {allowed}")
        if pre_tokenizer is not None and pre_tokenizer not in PRE_TOKENIZERS:
            raise InputError(f"pre-tokenizer is {pre_tokenizer!r}; llama.cpp knows {', '.join(PRE_TOKENIZERS)}")
        self.forced = None if gguf_type == AUTO else BLOCK_TYPES[gguf_type]
        self.pre_tokenizer = pre_tokenizer

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """Blocks need consecutive groups of whole blocks; 32 weights, or 64 for Q2_0."""
        if scheme.desc_act:
            raise UnsupportedSchemeError(
                "gguf has no act-order (desc_act): groups are consecutive blocks", instead=("gptq",)
            )
        if scheme.group_size != -1 and in_features % scheme.group_size:
            raise UnsupportedSchemeError(
                f"group_size {scheme.group_size} does not divide in_features {in_features}; gguf has no short groups; "
                "use --to native"
            )
        kind = self.forced or WRITABLE[-1]
        problem = refusal(kind, scheme, in_features)
        if problem:
            way = "--gguf-type auto" if kind.block > UNIT else "--to native"
            raise UnsupportedSchemeError(
                f"{scheme} does not fit gguf: {problem}, and both have to be multiples of it; use {way}"
            )

    def depends_on_values(self, scheme: QuantScheme) -> bool:
        """The widest type holds any integer of fewer bits than its own, and its own if they are symmetric."""
        return self.forced is None and scheme.bits >= WRITABLE[-1].bits and not scheme.sym

    def encode(self, layer: QuantizedLinear | PackedLinear) -> EncodedBlocks:
        """blocks ``[out, in / 32, bytes of 32 weights]`` and, if there is one, the bias in fp32."""
        self.check(layer.scheme, layer.out_features, layer.in_features)
        tensors, choice = self._encoded(layer)
        if layer.bias is not None:
            tensors["bias"] = _stored_bias(layer.bias)
        return EncodedBlocks(tensors, choice)

    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedLinear:
        """The layer in ``scheme``: its blocks as they are where that is their own, and otherwise the same weights with
        the bits and groups that a file of ours says they came from.
        """
        blocks = tensors.get("blocks")
        if blocks is None or blocks.dtype != torch.uint8:
            raise CheckpointError("no uint8 blocks; a layer has blocks and perhaps a bias")
        kind = self._kind({"blocks": tuple(blocks.shape)})
        codes, scales, minimums = unpack_blocks(kind, blocks)
        try:
            layer = decode_blocks(kind, codes, scales, minimums, tensors.get("bias"))
            same = (scheme.bits, scheme.width(layer.in_features)) == (kind.bits, kind.block)
            return (
                replace(layer, scheme=replace(layer.scheme, group_size=scheme.group_size))
                if same
                else regroup(layer, scheme, kind)
            )
        except InvalidLayerError as exc:
            raise CheckpointError(str(exc)) from exc

    def features(self, shapes: Mapping[str, tuple[int, ...]], scheme: QuantScheme) -> tuple[int, int]:
        """From the blocks' shape alone."""
        self._kind(shapes)
        return shapes["blocks"][0], shapes["blocks"][1] * UNIT

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """EXACT_WEIGHTS when every scale is an fp16 number and no integer is clipped."""
        if not holds_scales(layer.scales, torch.float16):
            return Exactness.ROUNDED
        if self.forced is None and layer.scheme.bits < WRITABLE[-1].bits:
            return Exactness.EXACT_WEIGHTS  # the widest type holds whatever the zeros are
        return Exactness.EXACT_WEIGHTS if fit(layer, self.forced or WRITABLE[-1]).exact else Exactness.ROUNDED

    def exact_option(self) -> str | None:
        """The smallest type that holds each layer."""
        return None if self.forced is None else f"--gguf-type {AUTO}"

    def bound(self, layer: QuantizedLinear) -> Tensor:
        """``|fp16(s)| * clip + |fp16(s) - s| * |q - z|`` and half an ulp of each of the two fp32 products.

        ``clip`` is by how many steps the farthest integer of the group lies outside a forced type's range.
        """
        stored = layer.scales.double().half().double()
        excess = fit(layer, self.forced or WRITABLE[-1]).excess
        clip = torch.zeros_like(stored) if excess is None else excess.double()
        width, columns = layer.scheme.group_size, layer.in_features
        clipping = expand_groups(stored.abs() * clip, columns, width)
        difference = expand_groups((stored - layer.scales.double()).abs(), columns, width)
        steps = dequantize(replace(layer, scales=torch.ones_like(layer.scales)), torch.float64).abs()
        weight = dequantize(layer, torch.float64).abs()
        limit = clipping + steps * difference
        rounding = torch.finfo(torch.float32).eps * weight + torch.finfo(torch.float32).smallest_normal
        return torch.where(limit == 0, 0.0, limit + rounding).float()

    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """What our files carry under ``eqat.quantization``: the scheme that the blocks were made from."""
        config = {
            "quant_method": self.id,
            **asdict(scheme),
            "overrides": {name: asdict(override) for name, override in overrides.items()},
            "meta": {"quantizer": [f"eqat:{__version__}"]},
        }
        return {key: value for key, value in config.items() if value != {}}

    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """bits and group_size; ``sym`` follows the values when a layer is decoded."""
        try:
            return QuantScheme(config_integer(config, "bits"), config_integer(config, "group_size"))
        except InvalidLayerError as exc:
            raise CheckpointError(f"quantization configuration: {exc}") from exc

    def layer_scheme(self, config: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]]) -> QuantScheme:
        """The override of this layer, or the model-wide scheme."""
        overrides = config.get("overrides") or {}
        fields = overrides.get(name, {}) if isinstance(overrides, dict) else None
        if not isinstance(fields, dict):
            raise CheckpointError(f"overrides is {overrides!r}; expected an object of layers and their fields")
        return self.parse_config({**config, **fields})

    def detect(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """quant_method gguf, which only our own reader of the container says."""
        return config.get("quant_method") == self.id and any(name.endswith(f".{self.marker}") for name in names)

    def reads(self, path: Path) -> bool:
        """A file that starts like GGUF, or is named so."""
        return (path.is_file() and is_gguf(path)) or (path.suffix == self.suffix and not path.is_dir())

    def open(self, path: Path) -> ModelReader:
        """See ``GgufReader``."""
        from .reader import GgufReader  # noqa: PLC0415

        return GgufReader(path)

    def pieces(self, source: SourceModel) -> Pieces:
        """See ``GgufPieces``."""
        from .pieces import GgufPieces  # noqa: PLC0415

        return GgufPieces(source)

    def create(self, out: Path, source: SourceModel, *, shard_size: int, force: bool) -> ModelWriter:
        """One file whatever ``shard_size`` says: llama.cpp's own tools split and merge."""
        from .writer import GgufWriter  # noqa: PLC0415

        return GgufWriter(out, source, self, pre_tokenizer=self.pre_tokenizer, force=force)

    def _encoded(self, layer: QuantizedLinear | PackedLinear) -> tuple[dict[str, Tensor], TypeChoice]:
        if self.forced is None:
            choice, found = choose(layer)
        else:
            choice, found = self._choice(self.forced), fit(layer, self.forced)
        kind = BLOCK_TYPES[choice.type]
        times = layer.scheme.width(layer.in_features) // kind.block
        scales = negated(layer.scales, found.flip)
        stored = _stored_scales(scales).repeat_interleave(times, dim=1)
        if isinstance(layer, PackedLinear) and found.exact and 2 <= layer.scheme.bits <= 4 and kind.bits <= 5:
            return {"blocks": stream_blocks(kind, layer, found.flip, stored)}, choice
        if not found.exact:
            choice = replace(choice, exact=False, reason=f"forced; q - z clipped to {kind.low}..{kind.high}")
        return {"blocks": pack_blocks(kind, integers(layer.unpack(), kind, found), stored)}, choice

    def _choice(self, kind: BlockType) -> TypeChoice:
        return TypeChoice(kind.name, kind.bits_per_weight, "forced" if self.forced else within(kind))

    def _kind(self, shapes: Mapping[str, tuple[int, ...]]) -> BlockType:
        shape = shapes.get("blocks", ())
        kind = block_type_of(shape[2]) if len(shape) == 3 else None
        if kind is None or shape[1] * UNIT % kind.block:
            raise CheckpointError(
                f"blocks have shape {list(shape)}; expected [out, in / 32, bytes of 32 weights] of "
                f"{', '.join(BLOCK_TYPES)}"
            )
        return kind


def _stored_scales(scales: Tensor) -> Tensor:
    stored = scales.to(torch.float16)
    if not torch.isfinite(stored).all():
        raise UnsupportedSchemeError(
            f"a scale is {float(scales.abs().max()):g}; gguf stores fp16, at most 65504; use --to native"
        )
    return stored


def _stored_bias(bias: Tensor) -> Tensor:
    stored = bias.to(torch.float32)
    if not torch.equal(stored.to(bias.dtype), bias):
        raise UnsupportedSchemeError("a bias needs float64; gguf stores fp32; use --to native")
    return stored.contiguous()
