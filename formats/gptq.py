"""GPTQ: a dense bit stream, fp16 scales; v1 stores ``z - 1``, v2 stores ``z``.

v1 has no room for ``z = 0``: ``z - 1`` wraps, and readers disagree on how. ``(q, s, z) -> (maxq - q, -s, maxq - z)``
leaves the weights as they are, so groups with ``z = 0`` are written with ``z = maxq`` and a negative scale, and no
field ever wraps. Layout, readers and sources: ``gptq.md``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .affine import dequantize, expand_groups
from .base import NO_OVERRIDES, Exactness
from .errors import CheckpointError, InvalidLayerError, UnsupportedSchemeError
from .packed import PackedLinear
from .qweight import QweightFormat, config_integer
from .types import QuantizedLinear, QuantScheme
from .version import __version__

__all__ = ["GptqV1Format", "GptqV2Format", "dynamic_rules", "producers"]

_BITS = (2, 3, 4, 8)
_USUAL_GROUPS = (128, 64, 32, 16)
# gptqmodel loads asymmetric v1 only from itself, from the version on that subtracts 1 the way this writer does.
_V1_QUANTIZER = "gptqmodel:0.9.0"


class GptqV2Format(QweightFormat):
    """GPTQ with raw zeros (``checkpoint_format: gptq_v2``); exact when scales are fp16 numbers."""

    id: ClassVar[str] = "gptq_v2"
    title: ClassVar[str] = "GPTQ with raw zeros, for readers that do not add 1"

    def per_word(self, bits: int) -> None:
        """A dense stream."""

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """2, 3, 4 or 8 bits, a group size that divides in_features, and whole words along both axes."""
        if scheme.bits not in _BITS:
            raise UnsupportedSchemeError(
                f"{self.id} holds 2, 3, 4 and 8 bits, not {scheme.bits}; use one of those or --to native"
            )
        step = 32 if scheme.bits == 3 else 32 // scheme.bits
        for axis, size in (("in_features", in_features), ("out_features", out_features)):
            if size % step:
                raise UnsupportedSchemeError(
                    f"{axis} is {size}; {self.id} at {scheme.bits} bits takes multiples of {step}; "
                    "leave this layer unquantized or use --to native"
                )
        if scheme.group_size != -1 and in_features % scheme.group_size:
            fitting = [str(size) for size in _USUAL_GROUPS if in_features % size == 0]
            raise UnsupportedSchemeError(
                f"group_size {scheme.group_size} does not divide in_features {in_features}; "
                f"these do: {', '.join([*fitting, '-1'])}; or use --to native"
            )

    def stored_scales(self, scales: Tensor) -> Tensor:
        """fp16.

        Raises:
            UnsupportedSchemeError: a scale is beyond fp16's largest number.
        """
        stored = scales.to(torch.float16)
        if not torch.isfinite(stored).all():
            raise UnsupportedSchemeError(
                f"a scale is {float(scales.abs().max()):g}; {self.id} stores fp16, at most 65504; use --to native"
            )
        return stored

    def stored_bias(self, bias: Tensor) -> Tensor:
        """fp16 where that is exact; otherwise as it is, since readers cast it when they load."""
        stored = bias.to(torch.float16)
        return stored if torch.equal(stored.to(bias.dtype), bias) else bias

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """EXACT when every scale is an fp16 number."""
        return Exactness.EXACT if _is_fp16(layer.scales) else Exactness.ROUNDED

    def bound(self, layer: QuantizedLinear) -> Tensor:
        """``|fp16(s) - s| * |q - z|``, plus half an ulp of each of the two fp32 products; ``[out, in]``."""
        difference = (layer.scales.double().half().double() - layer.scales.double()).abs()
        if layer.g_idx is None:
            columns = expand_groups(difference, layer.in_features, layer.scheme.group_size)
        else:
            columns = difference[:, layer.group_index()]
        weight = dequantize(layer, torch.float64)
        steps = dequantize(replace(layer, scales=torch.ones_like(layer.scales)), torch.float64).abs()
        rounding = torch.finfo(torch.float32).eps * weight.abs() + torch.finfo(torch.float32).smallest_normal
        limit = steps * columns
        return torch.where(limit == 0, 0.0, limit + rounding).float()

    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """What gptqmodel and transformers read; ``dynamic`` carries skipped and differing modules."""
        config = {
            "quant_method": "gptq",
            **asdict(scheme),
            "lm_head": "lm_head" in overrides or "lm_head" not in ignore,
            "checkpoint_format": self.id,
            "format": self.id,
            "pack_dtype": "int32",
            "meta": {"quantizer": self._quantizers()},
        }
        dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in ignore if name != "lm_head"}
        dynamic |= {f"+:^{re.escape(name)}$": asdict(override) for name, override in overrides.items()}
        if dynamic:
            config["dynamic"] = dynamic
        return config

    def sidecar_files(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, dict[str, Any]]:
        """``quantize_config.json``, which gptqmodel reads before ``config.json``."""
        return {"quantize_config.json": self.quantization_config(scheme, ignore, overrides)}

    def model_dtype(self) -> torch.dtype:
        """fp16: readers cast scales to the model's dtype, and bf16 would round them."""
        return torch.float16

    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """bits (or wbits), group_size, sym and desc_act with gptqmodel's defaults."""
        pack_dtype = config.get("pack_dtype", "int32")
        if pack_dtype != "int32":
            raise CheckpointError(f"pack_dtype is {pack_dtype!r}; only int32 words are read")
        try:
            return QuantScheme(
                config_integer(config, "bits", "wbits", "w_bit"),
                config_integer(config, "group_size", "q_group_size"),
                sym=bool(config.get("sym", True)),
                desc_act=bool(config.get("desc_act", False)),
            )
        except InvalidLayerError as exc:
            raise CheckpointError(f"quantization configuration: {exc}") from exc

    def layer_scheme(self, config: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]]) -> QuantScheme:
        """The model-wide scheme with the first ``dynamic`` pattern that matches applied to it."""
        for pattern, fields in dynamic_rules(config).items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
                return self.parse_config({**config, **fields})
        return self.parse_config(config)

    def detect(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """quant_method gptq (AutoGPTQ left it out) and this checkpoint_format; without a format it is v1."""
        if not config or not any(name.endswith(".qweight") for name in names):
            return False
        if config.get("quant_method", config.get("method", "gptq")) != "gptq":
            return False
        return _labels(config) == {self.id}

    def _quantizers(self) -> list[str]:
        return [f"eqat:{__version__}"]


class GptqV1Format(GptqV2Format):
    """GPTQ with ``z - 1`` in qzeros (``checkpoint_format: gptq``); exact weights when scales are fp16 numbers.

    Args:
        wrap: how a producer that met ``z = 0`` wrapped it: within the ``"field"``, or by borrowing from the
            ``"word"`` (gptqmodel at 2, 4 and 8 bits subtracts from whole words).
    """

    id: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ, the layout most tools read (v1 zeros)"

    def __init__(self, wrap: Literal["field", "word"] = "field") -> None:
        self.wrap = wrap

    def configured(self, config: Mapping[str, Any]) -> GptqV1Format:
        """gptqmodel's own files borrow across the word; ours never wrap, other producers' are taken field by field."""
        found = producers(config)
        return GptqV1Format("word" if "gptqmodel" in found and "eqat" not in found else "field")

    def encode_packed(self, layer: PackedLinear) -> dict[str, Tensor]:
        """Groups with ``z = 0`` are complemented first."""
        absent = layer.zeros == 0
        return super().encode_packed(layer.complement(absent) if bool(absent.any()) else layer)

    def stored_zeros(self, zeros: Tensor) -> Tensor:
        """``z - 1``; zeros are 1 or more here."""
        return zeros - 1

    def zeros_from_stored(self, fields: Tensor, bits: int) -> Tensor:
        """``z + 1`` modulo ``2 ** bits``, with a carry into the next field of the word where the producer borrowed."""
        zeros = fields.to(torch.int32) + 1
        if self.wrap == "word" and 32 % bits == 0:
            zeros = _carry(zeros, bits)
        return zeros & (2**bits - 1)

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """EXACT_WEIGHTS instead of EXACT when a group was complemented."""
        plain = super().exactness(layer)
        complemented = plain is Exactness.EXACT and bool((layer.zeros == 0).any())
        return Exactness.EXACT_WEIGHTS if complemented else plain

    def _quantizers(self) -> list[str]:
        return [*super()._quantizers(), _V1_QUANTIZER]


def dynamic_rules(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """gptqmodel's ``dynamic``: regex -> fields that differ for the modules it matches; ``-:regex`` leaves them out.

    Raises:
        CheckpointError: it is not such an object, or a regex does not compile.
    """
    rules = config.get("dynamic") or {}
    if not isinstance(rules, dict) or not all(isinstance(fields, dict) for fields in rules.values()):
        raise CheckpointError(f"dynamic is {rules!r}; expected an object of module patterns and their fields")
    for pattern in rules:
        try:
            re.compile(pattern.removeprefix("+:").removeprefix("-:"))
        except re.error as exc:
            raise CheckpointError(
                f"dynamic has the pattern {pattern!r}, which is no regular expression: {exc}"
            ) from exc
    return rules


def producers(config: Mapping[str, Any]) -> dict[str, str]:
    """Tool -> version from ``meta.quantizer``; empty where there is none."""
    meta = config.get("meta")
    entries = meta.get("quantizer") if isinstance(meta, dict) else None
    listed = entries if isinstance(entries, list) else [entries] if entries else []
    pairs = (str(entry).lower().partition(":") for entry in listed)
    return {tool: version for tool, _, version in pairs}


def _labels(config: Mapping[str, Any]) -> set[str]:
    """What the two format fields say; readers disagree on which one wins, so two different labels are no format."""
    found = {str(config[key]).lower() for key in ("checkpoint_format", "format") if config.get(key)}
    return found or {GptqV1Format.id}


def _is_fp16(scales: Tensor) -> bool:
    return scales.dtype == torch.float16 or torch.equal(scales.half().to(scales.dtype), scales)


def _carry(zeros: Tensor, bits: int) -> Tensor:
    """Fields after adding 1 to each and carrying overflow upwards inside 32-bit words along the last axis."""
    rows, columns = zeros.shape
    per_word = 32 // bits
    padded = torch.nn.functional.pad(zeros, (0, -columns % per_word)).view(rows, -1, per_word)
    carry = torch.zeros_like(padded[..., 0])
    fields = []
    for i in range(per_word):
        total = padded[..., i] + carry
        carry = total >> bits
        fields.append(total)
    return torch.stack(fields, dim=-1).view(rows, -1)[:, :columns]
