"""What a checkpoint holds: scheme, sizes, bits per weight, and the distribution of zeros and scales.

Reads one layer at a time. A parameter is a weight of the full-precision model; packed tensors count as the weights
they stand for.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eqat_export.tensors import dtype_name
from formats.errors import InputError
from formats.gptq import producers
from formats.model import Checkpoint
from formats.types import QuantizedLinear

__all__ = ["Histograms", "Inspection", "Part", "inspect_checkpoint", "scale_exponents"]

QUANTIZED, EMBEDDINGS, OTHER_LINEARS, VECTORS = (
    "quantized linears",
    "embeddings, head",
    "other linears",
    "norms, biases",
)


@dataclass
class Part:
    """A kind of tensor, summed over the model."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0

    def add(self, nbytes: int, parameters: int, tensors: int = 1) -> None:
        """Counts tensors that stand for this many parameters."""
        self.tensors += tensors
        self.parameters += parameters
        self.nbytes += nbytes


@dataclass
class Histograms:
    """Counts over every group of the layers looked at.

    Attributes:
        zeros: zero-point -> groups.
        scales: binary exponent ``floor(log2 |scale|)`` -> groups, scales of exactly zero left out.
        codes: code -> weights.
        zero_scales: groups whose scale is exactly zero.
        negative_scales: groups whose scale is negative (GPTQ v1's complement).
    """

    zeros: Counter[int] = field(default_factory=Counter)
    scales: Counter[int] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    zero_scales: int = 0
    negative_scales: int = 0

    def add(self, layer: QuantizedLinear) -> None:
        """Counts one layer."""
        size = layer.scheme.maxq + 1
        self.zeros.update(_counts(layer.zeros, size))
        self.codes.update(_counts(layer.codes, size))
        self.scales.update(scale_exponents(layer.scales))
        self.zero_scales += int((layer.scales == 0).sum())
        self.negative_scales += int((layer.scales < 0).sum())


@dataclass
class Inspection:
    """Everything ``eqat inspect`` shows.

    Attributes:
        schemes: scheme as text -> layers that have it.
        scale_dtypes: dtype of the scales -> layers that have it.
        parts: what the bytes are spent on.
        layer_tensors: with one layer chosen, its local tensors: name -> (dtype, shape, bytes).
    """

    folder: str
    format_id: str | None
    title: str
    producer: str
    architecture: str
    layers: int
    schemes: Counter[str] = field(default_factory=Counter)
    scale_dtypes: Counter[str] = field(default_factory=Counter)
    parts: dict[str, Part] = field(default_factory=dict)
    histograms: Histograms = field(default_factory=Histograms)
    layer_tensors: dict[str, tuple[str, tuple[int, ...], int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def parameters(self) -> int:
        """Weights of the full-precision model."""
        return sum(part.parameters for part in self.parts.values())

    def bits_per_weight(self, part: str | None = None) -> float:
        """Bits a weight takes, scales and zeros and everything else stored with it included."""
        chosen = [self.parts[part]] if part else list(self.parts.values())
        return 8 * sum(item.nbytes for item in chosen) / max(sum(item.parameters for item in chosen), 1)

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "checkpoint": self.folder,
            "format": self.format_id,
            "producer": self.producer,
            "architecture": self.architecture,
            "layers": self.layers,
            "schemes": dict(self.schemes),
            "scale_dtypes": dict(self.scale_dtypes),
            "bytes": self.nbytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight(),
            "parts": {
                name: {
                    "tensors": part.tensors,
                    "parameters": part.parameters,
                    "bytes": part.nbytes,
                    "bits_per_weight": self.bits_per_weight(name),
                }
                for name, part in self.parts.items()
            },
            "zeros": {str(value): count for value, count in sorted(self.histograms.zeros.items())},
            "codes": {str(value): count for value, count in sorted(self.histograms.codes.items())},
            "scales_log2": {str(value): count for value, count in sorted(self.histograms.scales.items())},
            "zero_scales": self.histograms.zero_scales,
            "negative_scales": self.histograms.negative_scales,
            "layer_tensors": {
                name: {"dtype": dtype, "shape": list(shape), "bytes": nbytes}
                for name, (dtype, shape, nbytes) in self.layer_tensors.items()
            },
        }


def inspect_checkpoint(
    checkpoint: Checkpoint, layer: str | None = None, step: Callable[[str], None] = lambda name: None
) -> Inspection:
    """Looks at a checkpoint, or at one of its layers.

    Args:
        checkpoint: any format, full precision included.
        layer: module path of the only layer to look at.
        step: called with each layer's name once it is done.

    Raises:
        InputError: there is no such quantized layer.
    """
    names = checkpoint.layer_names
    if layer is not None:
        if layer not in names:
            raise InputError(_no_such_layer(layer, names))
        names = (layer,)
    form = checkpoint.format
    inspection = Inspection(
        folder=str(checkpoint.reader.folder),
        format_id=form.id if form else None,
        title=form.title if form else "full precision",
        producer=producer(checkpoint),
        architecture=_architecture(checkpoint.reader.config),
        layers=len(names),
    )
    for name in names:
        _add_layer(inspection, checkpoint, name, whole=layer is None)
        step(name)
    if layer is None:
        _add_rest(inspection, checkpoint)
    return inspection


def producer(checkpoint: Checkpoint) -> str:
    """Who wrote the checkpoint, as far as its configuration tells."""
    tools = producers(checkpoint.reader.quantization_config)
    if "eqat" in tools:
        tools = {"eqat": tools["eqat"]}  # v1 files name gptqmodel too, only for its version check
    if tools:
        return ", ".join(f"{tool} {version}".strip() for tool, version in tools.items())
    version = checkpoint.reader.quantization_config.get("version")
    if checkpoint.reader.quantization_config.get("quant_method") == "eqat":
        return f"eqat {version}" if version else "eqat"
    if checkpoint.format is not None and not checkpoint.reader.quantization_config:
        return "EfficientQAT (no quantization_config)"
    return "not recorded"


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    return ", ".join(map(str, named)) if isinstance(named, list) and named else "unknown"


def scale_exponents(scales: Tensor) -> Counter[int]:
    """``floor(log2 |scale|)`` -> count, zeros left out."""
    nonzero = scales.float().abs()
    nonzero = nonzero[nonzero > 0]
    exponents = torch.frexp(nonzero).exponent - 1  # frexp's mantissa is in [0.5, 1)
    values, counts = exponents.unique(return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _add_layer(inspection: Inspection, checkpoint: Checkpoint, name: str, *, whole: bool) -> None:
    layer = checkpoint.layer(name)
    inspection.schemes[str(layer.scheme)] += 1
    inspection.scale_dtypes[dtype_name(layer.scales.dtype)] += 1
    inspection.histograms.add(layer)
    stored = {local: checkpoint.reader.tensors[f"{name}.{local}"] for local in checkpoint.layer_shapes(name)}
    part = inspection.parts.setdefault(QUANTIZED, Part())
    biases = layer.out_features if layer.bias is not None else 0
    part.add(sum(info.nbytes for info in stored.values()), layer.codes.numel() + biases, len(stored))
    if not whole:
        inspection.layer_tensors = {
            local: (dtype_name(info.dtype), info.shape, info.nbytes) for local, info in stored.items()
        }


def _add_rest(inspection: Inspection, checkpoint: Checkpoint) -> None:
    vocabulary = checkpoint.reader.config.get("vocab_size")
    for name in checkpoint.passthrough_names:
        info = checkpoint.reader.tensors[name]
        if len(info.shape) < 2:
            kind = VECTORS
        elif info.shape[0] == vocabulary:
            kind = EMBEDDINGS
        else:
            kind = OTHER_LINEARS
        parameters = 1
        for size in info.shape:
            parameters *= size
        inspection.parts.setdefault(kind, Part()).add(info.nbytes, parameters)


def _no_such_layer(layer: str, names: tuple[str, ...]) -> str:
    if not names:
        return f"layer {layer!r}: this checkpoint has no quantized layers; leave --layer out"
    containing = [name for name in names if layer in name]
    close = containing[:3] or difflib.get_close_matches(layer, names, n=3, cutoff=0.3) or names[:3]
    return f"no quantized layer {layer!r}; close ones are {', '.join(close)}"


def _counts(values: Tensor, size: int) -> dict[int, int]:
    counts = torch.bincount(values.flatten().int(), minlength=size).tolist()
    return {value: count for value, count in enumerate(counts) if count}
