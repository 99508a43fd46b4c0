"""What verification has seen of each layer, kept for questions about the whole checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from eqat_export.tensors import dtype_name
from formats.gptq_zeros import ZeroDiagnosis
from formats.model import Checkpoint
from formats.types import QuantizedLinear

__all__ = ["LayerValues", "Survey"]


@dataclass(frozen=True)
class LayerValues:
    """What the tensors of one layer hold, whatever the configuration says.

    Attributes:
        file: the weight file with its codes.
        scale_dtype: as stored, e.g. ``float16``.
        symmetric: every zero-point is the middle of the range.
        act_order: g_idx reorders the groups.
        lowest_zero, highest_zero: smallest and largest zero-point.
    """

    file: str
    scale_dtype: str
    symmetric: bool
    act_order: bool
    lowest_zero: int
    highest_zero: int


@dataclass
class Survey:
    """Filled by ``verify_checkpoint``.

    Attributes:
        layers: layer name -> values, for every layer that could be decoded.
        zeros: the verdict on the zero convention, None where there is only one or none could be had.
    """

    layers: dict[str, LayerValues] = field(default_factory=dict)
    zeros: ZeroDiagnosis | None = None

    def see(self, checkpoint: Checkpoint, name: str, layer: QuantizedLinear) -> None:
        """Takes one decoded layer into account."""
        marker = checkpoint.format.marker if checkpoint.format else "weight"
        self.layers[name] = LayerValues(
            checkpoint.reader.tensors[f"{name}.{marker}"].shard,
            dtype_name(layer.scales.dtype),
            layer.scheme.sym,
            layer.scheme.desc_act,
            int(layer.zeros.min()),
            int(layer.zeros.max()),
        )
