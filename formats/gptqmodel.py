"""What gptqmodel's layouts share besides their integers and fp16 scales: the configuration."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from .base import NO_OVERRIDES, PackedFormat
from .errors import CheckpointError, InvalidLayerError
from .fp16_scales import Fp16ScalesFormat
from .qweight import config_integer
from .types import QuantScheme
from .version import __version__

__all__ = ["GptqmodelFormat", "dynamic_rules", "producers"]

# What a configuration without a format means.
_UNNAMED = "gptq"


class GptqmodelFormat(Fp16ScalesFormat, PackedFormat):
    """A layout that gptqmodel names in ``checkpoint_format``; exact when scales are fp16 numbers."""

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
    return found or {_UNNAMED}
