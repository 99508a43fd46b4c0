"""EfficientQAT's own layout: what training writes, and what upstream published.

``32 // bits`` values a word, raw zeros, scales and bias in whatever dtype they have. Upstream's checkpoints carry no
quantization configuration, so bits and group_size follow from shapes. Bytes and sources: ``native.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from .base import NO_OVERRIDES
from .errors import CheckpointError, InvalidLayerError
from .packing import packed_length
from .qweight import QweightFormat, config_integer
from .types import QuantScheme
from .version import __version__

__all__ = ["NativeFormat"]

_UPSTREAM_BITS = (2, 3, 4, 8)


class NativeFormat(QweightFormat):
    """Any bits 1 to 8, any group size, ragged last words and groups; exact."""

    id: ClassVar[str] = "native"
    title: ClassVar[str] = "EfficientQAT's own layout, exact in every scale dtype; training writes it"

    def per_word(self, bits: int) -> int:
        """``32 // bits``; the rest of the word stays zero."""
        return 32 // bits

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """Every scheme and shape is held."""

    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """A self-describing configuration; ``layers`` holds the overrides."""
        config = {
            "quant_method": "eqat",
            "checkpoint_format": self.id,
            **asdict(scheme),
            "modules_to_not_convert": list(ignore),
            "version": __version__,
        }
        if overrides:
            config["layers"] = {name: asdict(override) for name, override in overrides.items()}
        return config

    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """bits, group_size, sym and desc_act."""
        try:
            return QuantScheme(
                config_integer(config, "bits"),
                config_integer(config, "group_size"),
                sym=bool(config.get("sym", False)),
                desc_act=bool(config.get("desc_act", False)),
            )
        except InvalidLayerError as exc:
            raise CheckpointError(f"quantization configuration: {exc}") from exc

    def layer_scheme(self, config: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]]) -> QuantScheme:
        """The layer's override, or the model-wide scheme."""
        layers = config.get("layers", {})
        if not isinstance(layers, dict) or not isinstance(layers.get(name, config), Mapping):
            raise CheckpointError(f"layers is {layers!r}; expected an object of module paths and their schemes")
        return self.parse_config(layers.get(name, config))

    def detect(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Our configuration; or none at all beside qweight, qzeros and scales, which is upstream's."""
        if config:
            return config.get("quant_method") == "eqat" and config.get("checkpoint_format") == self.id
        return all(any(name.endswith(suffix) for name in names) for suffix in (".qweight", ".qzeros", ".scales"))

    def infer_config(self, layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Any]:
        """Upstream's scheme: K entries in g_idx, ``ceil(K / (32 // bits))`` rows in qweight, a row of scales a group.

        Small layers can fit several bits; the one that fits all layers is taken.

        Raises:
            CheckpointError: no bits or group size fits every layer, or several do.
        """
        bits = [b for b in _UPSTREAM_BITS if all(self._fits(b, shapes) for shapes in layers.values())]
        if len(bits) != 1:
            found = f"{bits} all fit" if bits else f"none of {list(_UPSTREAM_BITS)} fits"
            raise CheckpointError(f"no quantization configuration and the shapes do not tell bits: {found}; add one")
        sizes = {shapes["g_idx"][0] // shapes["scales"][0] for shapes in layers.values() if shapes["scales"][0] > 1}
        if len(sizes) > 1:
            raise CheckpointError(f"no quantization configuration and layers differ in group_size: {sorted(sizes)}")
        return self.quantization_config(QuantScheme(bits[0], sizes.pop() if sizes else -1), ignore=())

    def _fits(self, bits: int, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        match shapes.get("qweight"), shapes.get("qzeros"), shapes.get("scales"), shapes.get("g_idx"):
            case (rows, n), (groups, columns), (scale_rows, scale_n), (k,):
                return (
                    groups == scale_rows > 0
                    and n == scale_n
                    and k % groups == 0
                    and rows == packed_length(k, bits, per_word=self.per_word(bits))
                    and columns == packed_length(n, bits, per_word=self.per_word(bits))
                )
        return False
