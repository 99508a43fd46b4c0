"""auto-round: GPTQ's dense stream with raw zeros and no g_idx, under a configuration of its own.

Its ``packing_format`` tells how a file's integers lie: written here is ``auto_round:gptqmodel``; read are also the two
that store GPTQ v1's ``z - 1`` or AWQ's interleaved words. Layout, readers and sources: ``auto_round.md``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Tensor

from .awq import AwqFormat
from .base import NO_OVERRIDES
from .errors import CheckpointError, InvalidLayerError, UnsupportedSchemeError
from .fp16_scales import Fp16ScalesFormat
from .gptq import GptqV1Format
from .packed import PackedLinear
from .qweight import QweightFormat, config_integer
from .types import QuantScheme

__all__ = ["AutoRoundFormat"]

_BITS = (2, 3, 4, 5, 6, 7, 8)
_STEP = 32
_METHODS = ("auto-round", "intel/auto-round")
_WRITTEN = "auto_round:gptqmodel"
_UNNAMED = "auto_round:gptq"  # what transformers' AutoRoundConfig takes when there is none
_RAW, _V1, _AWQ = "raw", "v1", "awq"
_PACKINGS = {
    "auto_round": _RAW,
    _WRITTEN: _RAW,
    _UNNAMED: _V1,
    "auto_round:auto_gptq": _V1,
    "auto": _V1,
    "auto_round:awq": _AWQ,
    "auto_round:auto_awq": _AWQ,
}
_REGEX = re.compile(r"[\\^$*+?|()\[\]]")
_TRANSFORMS = ("rotation_config", "spinquant_config")


class AutoRoundFormat(Fp16ScalesFormat, QweightFormat):
    """qweight, raw qzeros and fp16 scales; exact when scales are fp16 numbers.

    Args:
        packing: how the integers of a checkpoint lie: ``raw``, ``v1`` or ``awq``; only ``raw`` is written.
    """

    id: ClassVar[str] = "auto-round"
    title: ClassVar[str] = "auto-round, for transformers with the auto-round package"

    def __init__(self, packing: str = _RAW) -> None:
        self.packing = packing

    def per_word(self, bits: int) -> None:
        """A dense stream."""

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """2 to 8 bits, consecutive groups that divide in_features, and thirty-twos along both axes."""
        if scheme.bits not in _BITS:
            raise UnsupportedSchemeError(f"auto-round holds 2 to 8 bits, not {scheme.bits}; use --to native")
        if scheme.desc_act:
            raise UnsupportedSchemeError("auto-round has no g_idx, which desc_act needs", instead=("gptq",))
        for axis, size in (("in_features", in_features), ("out_features", out_features)):
            if size % _STEP:
                raise UnsupportedSchemeError(
                    f"{axis} is {size}; auto-round at {scheme.bits} bits takes multiples of {_STEP}; "
                    "leave this layer unquantized or use --to native"
                )
        if in_features % scheme.width(in_features):
            raise UnsupportedSchemeError(
                f"group_size {scheme.group_size} does not divide in_features {in_features}; use --to native"
            )

    def encode_packed(self, layer: PackedLinear) -> dict[str, Tensor]:
        """qweight, qzeros, scales and, if there is one, bias.

        Raises:
            UnsupportedSchemeError: scales that fp16 cannot hold.
        """
        tensors = super().encode_packed(layer)
        del tensors["g_idx"]
        return tensors

    def decode_packed(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> PackedLinear:
        """The canonical layer, by the packing that the configuration names."""
        if self.packing == _AWQ:
            return PackedLinear.pack(AwqFormat().decode(tensors, scheme))
        return super().decode_packed(tensors, scheme)

    def zeros_from_stored(self, fields: Tensor, bits: int) -> Tensor:
        """The fields, or one more than they say.

        auto-round before its pull request 2273 stored the sum of ``(z - 1) << shift`` over a word, which borrows from
        the next field at z = 0; later versions store 1 for such a z, and no field of theirs wraps.
        """
        if self.packing == _V1:
            return GptqV1Format("word").zeros_from_stored(fields, bits)
        return super().zeros_from_stored(fields, bits)

    def features(self, shapes: Mapping[str, tuple[int, ...]], scheme: QuantScheme) -> tuple[int, int]:
        """By qweight, which AWQ packs along the other axis."""
        return AwqFormat().features(shapes, scheme) if self.packing == _AWQ else super().features(shapes, scheme)

    def configured(self, config: Mapping[str, Any]) -> AutoRoundFormat:
        """With the packing that the configuration names.

        Raises:
            CheckpointError: a packing format that is not read.
        """
        named = config.get("packing_format", _UNNAMED)
        if named not in _PACKINGS:
            raise CheckpointError(f"packing_format is {named!r}; read are {', '.join(_PACKINGS)}")
        return AutoRoundFormat(_PACKINGS[named])

    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """What auto-round writes; ``extra_config`` carries skipped and differing modules, and a quantized lm_head."""
        extra: dict[str, dict[str, Any]] = {name: {"bits": 16, "data_type": "float"} for name in ignore}
        if "lm_head" not in ignore:
            extra["lm_head"] = _fields(scheme)
        extra |= {name: _fields(override) for name, override in overrides.items()}
        config = {"quant_method": self.id, "packing_format": _WRITTEN, **_fields(scheme)}
        return config | ({"extra_config": extra} if extra else {})

    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """bits, group_size and sym of integer weights.

        Raises:
            CheckpointError: also for other data types, quantized activations and rotated weights.
        """
        data_type = config.get("data_type", "int")
        if data_type != "int":
            raise CheckpointError(f"data_type is {data_type!r}; only int is read")
        if (config.get("act_bits") or 16) <= 8:
            raise CheckpointError(f"act_bits is {config['act_bits']}; only weights may be quantized")
        for key in _TRANSFORMS:
            if config.get(key):
                raise CheckpointError(f"{key} is set: its weights are meant for rotated activations, and are not read")
        try:
            return QuantScheme(
                config_integer(config, "bits"), config_integer(config, "group_size"), sym=bool(config.get("sym", True))
            )
        except InvalidLayerError as exc:
            raise CheckpointError(f"quantization configuration: {exc}") from exc

    def layer_scheme(self, config: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]]) -> QuantScheme:
        """The model-wide scheme with what ``extra_config`` has for the module applied to it."""
        extra = config.get("extra_config") or {}
        if not isinstance(extra, dict) or not all(isinstance(fields, dict) for fields in extra.values()):
            raise CheckpointError(f"extra_config is {extra!r}; expected an object of modules and their fields")
        patterns = (key for key in extra if _REGEX.search(key) and re.search(key, name))
        key = name if name in extra else next(patterns, None)
        return self.parse_config(config if key is None else {**config, **extra[key]})

    def detect(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """quant_method auto-round."""
        return config.get("quant_method") in _METHODS and any(name.endswith(".qweight") for name in names)


def _fields(scheme: QuantScheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym, "data_type": "int"}
