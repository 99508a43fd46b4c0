"""One checkpoint against another: every layer, then every other tensor.

The first checkpoint is the one under test and the second the truth:

- both quantized: codes, zeros, scales and dequantized fp32 weights; equal, or within the bound that the first's
  format declares;
- the first in full precision, the second quantized (a ``dense`` export): weights within the bound of the rounding to
  the first's dtype;
- the first quantized, the second in full precision: the quantization error, which is information and never fails;
- both in full precision: bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from eqat_export.findings import Finding, error, note
from eqat_export.tensors import dtype_name, same_bits
from formats import get_format
from formats.affine import dequantize
from formats.base import Format
from formats.conformance import compare
from formats.errors import CheckpointError, InvalidLayerError
from formats.model import Checkpoint
from formats.types import QuantizedLinear

__all__ = ["CheckpointComparison", "LayerRow", "compare_checkpoints"]


@dataclass(frozen=True)
class LayerRow:
    """How one layer compares; counts are of differing values.

    Attributes:
        codes, zeros, scales: how many differ; None where one side has none.
        error: largest absolute difference of the fp32 weights.
        used: largest share of its bound that any weight's difference takes; above 1 is too far, None is not judged.
        relative: ``||difference|| / ||truth||``, both L2.
        ok: within the bound.
    """

    name: str
    codes: int | None
    zeros: int | None
    scales: int | None
    error: float
    used: float | None
    relative: float
    ok: bool


@dataclass
class CheckpointComparison:
    """Every layer's row, worst first, and what was found beside the layers."""

    checkpoint: str
    against: str
    informational: bool
    rows: list[LayerRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    tensors: int = 0

    @property
    def exact(self) -> bool:
        """No weight of any layer differs at all."""
        return all(row.error == 0 for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "checkpoint": self.checkpoint,
            "against": self.against,
            "informational": self.informational,
            "layers": [vars(row) for row in self.rows],
            "other_tensors": self.tensors,
        }


def compare_checkpoints(
    checkpoint: Checkpoint, truth: Checkpoint, step: Callable[[str], None] = lambda name: None
) -> CheckpointComparison:
    """Compares two checkpoints of the same model.

    Args:
        checkpoint: the one under test.
        truth: the one it should equal.
        step: called with each layer's name once it is done.
    """
    result = CheckpointComparison(
        str(checkpoint.reader.folder), str(truth.reader.folder), checkpoint.format is not None and truth.format is None
    )
    quantized = dict.fromkeys((*checkpoint.layer_names, *truth.layer_names))
    ours, theirs = _other_names(checkpoint, quantized), _other_names(truth, quantized)
    layers, their_layers = _layers(checkpoint, quantized), _layers(truth, quantized)
    findings = [*_only_one_side(layers, their_layers, result), *_only_one_side(ours, theirs, result)]
    for name in layers:
        if name in their_layers:
            findings += _compare_layer(checkpoint, truth, name, result)
        step(name)
    for name in ours:
        if name in theirs:
            findings += compare_values(name, checkpoint.get(name), truth.get(name))
            result.tensors += 1
    if not _same_grouping(checkpoint, truth):
        same = all(row.ok for row in result.rows)
        text = f"{checkpoint.scheme} here, {truth.scheme} in {result.against}"
        findings.insert(0, note("scheme", text) if same else error("scheme", text))
    # training moves norms, and adds tokens: against the original model that is no defect
    result.findings = [replace(finding, severity="note") for finding in findings] if result.informational else findings
    result.rows.sort(key=lambda row: (row.ok, -row.relative))
    return result


def _same_grouping(checkpoint: Checkpoint, truth: Checkpoint) -> bool:
    ours, theirs = checkpoint.scheme, truth.scheme
    return ours is None or theirs is None or (ours.bits, ours.group_size) == (theirs.bits, theirs.group_size)


def _layers(checkpoint: Checkpoint, quantized: dict[str, None]) -> dict[str, None]:
    """Those of the layers quantized on either side that a checkpoint has, in any form."""
    dense = checkpoint.reader.tensors
    return {name: None for name in quantized if name in checkpoint.layer_names or f"{name}.weight" in dense}


def _other_names(checkpoint: Checkpoint, quantized: dict[str, None]) -> dict[str, None]:
    """Tensors that belong to no layer quantized on either side."""
    owned = {f"{name}.{local}" for name in quantized for local in ("weight", "bias")}
    return {name: None for name in checkpoint.passthrough_names if name not in owned}


def _only_one_side(ours: Iterable[str], theirs: Iterable[str], result: CheckpointComparison) -> Iterator[Finding]:
    for name in ours:
        if name not in theirs:
            yield error(name, f"is not in {result.against}")
    for name in theirs:
        if name not in ours:
            yield error(name, f"is missing; {result.against} has it")


def _compare_layer(
    checkpoint: Checkpoint, truth: Checkpoint, name: str, result: CheckpointComparison
) -> Iterator[Finding]:
    try:
        ours, theirs = _load(checkpoint, name), _load(truth, name)
    except (CheckpointError, InvalidLayerError) as exc:
        yield error(name, str(exc.__cause__ or exc))
        return
    stored = checkpoint.stored_weight(name, ours) if isinstance(ours, QuantizedLinear) else None
    weight, exact = _dense(ours) if stored is None else stored, _dense(theirs)
    if weight.shape != exact.shape:
        yield error(name, f"has weights {list(weight.shape)}, not {list(exact.shape)}")
        return
    difference = (weight.float() - exact.float()).abs()
    size = float(torch.linalg.vector_norm(exact.float()))
    relative = float(torch.linalg.vector_norm(difference)) / size if size else float(difference.max())
    if result.informational:
        result.rows.append(LayerRow(name, None, None, None, float(difference.max()), None, relative, True))
        return
    counts: tuple[int | None, int | None, int | None] = (None, None, None)
    ok = bool((difference == 0).all())
    bound = torch.zeros(1, 1)
    if isinstance(theirs, QuantizedLinear):
        form = _declaring_format(checkpoint, ours)
        if isinstance(ours, QuantizedLinear):
            ours = turn_back(ours, theirs)
            counts = _counts(ours, theirs)
        ok = compare(theirs, ours, form, stored).ok and not counts[0] and not counts[1]
        bound = form.bound(theirs)
    shares = torch.where(difference == 0, 0.0, difference / bound)
    result.rows.append(LayerRow(name, *counts, float(difference.max()), float(shares.max()), relative, ok))
    yield from _compare_bias(name, _bias(checkpoint, name, ours), _bias(truth, name, theirs))


def _load(checkpoint: Checkpoint, name: str) -> QuantizedLinear | Tensor:
    return checkpoint.layer(name) if name in checkpoint.layer_names else checkpoint.get(f"{name}.weight")


def _dense(layer: QuantizedLinear | Tensor) -> Tensor:
    return dequantize(layer) if isinstance(layer, QuantizedLinear) else layer


def _declaring_format(checkpoint: Checkpoint, layer: QuantizedLinear | Tensor) -> Format:
    """The format that states how far a layer of the checkpoint under test may be from the truth."""
    if isinstance(layer, Tensor) or checkpoint.format is None:
        return get_format("dense", dtype=layer.dtype if isinstance(layer, Tensor) else torch.float32)
    return checkpoint.format


def turn_back(ours: QuantizedLinear, theirs: QuantizedLinear) -> QuantizedLinear:
    """Our layer with the other side's codes and zeros in groups where ours are the same integers in another way.

    ``(maxq - q, -s, maxq - z)`` are the same weights, and so are ``(q + c, s, z + c)``; which of them a file holds is
    its format's affair.
    """
    if not _alike(ours, theirs):
        return ours
    mirrored = (ours.zeros == ours.scheme.maxq - theirs.zeros) & (ours.scales.signbit() != theirs.scales.signbit())
    ours = ours.complement(mirrored) if bool(mirrored.any()) else ours
    width = ours.scheme.width(ours.in_features)
    turned = ours.scales.signbit() != theirs.scales.signbit()
    settled = torch.equal(ours.zeros, theirs.zeros) and not bool(turned.any())
    if settled or ours.g_idx is not None or ours.in_features % width:
        return ours
    steps = _steps(ours, width) * torch.where(turned, -1, 1).to(torch.int16)[..., None]
    same = (steps == _steps(theirs, width)).all(dim=2)  # [out, groups]
    codes = torch.where(same.repeat_interleave(width, dim=1), theirs.codes, ours.codes)
    zeros = torch.where(same, theirs.zeros, ours.zeros)
    return replace(
        ours,
        codes=codes,
        zeros=zeros,
        scales=torch.where(same & turned, -ours.scales, ours.scales),
        scheme=replace(ours.scheme, sym=bool((zeros == 2 ** (ours.scheme.bits - 1)).all())),
    )


def _steps(layer: QuantizedLinear, width: int) -> Tensor:
    """``q - z``, int16 ``[out, groups, width]``."""
    codes = layer.codes.view(layer.out_features, layer.groups, width).to(torch.int16)
    return codes.sub_(layer.zeros.to(torch.int16)[..., None])


def _counts(ours: QuantizedLinear, theirs: QuantizedLinear) -> tuple[int | None, int | None, int | None]:
    """How many codes, zeros and scales differ; None where the two group their inputs differently."""
    if not _alike(ours, theirs):
        return None, None, None
    return (
        int((ours.codes != theirs.codes).sum()),
        int((ours.zeros != theirs.zeros).sum()),
        int((ours.scales.float() != theirs.scales.float()).sum()),
    )


def _alike(ours: QuantizedLinear, theirs: QuantizedLinear) -> bool:
    return (
        ours.scheme.bits == theirs.scheme.bits
        and ours.scales.shape == theirs.scales.shape
        and torch.equal(ours.group_index(), theirs.group_index())
    )


def _bias(checkpoint: Checkpoint, name: str, layer: QuantizedLinear | Tensor) -> Tensor | None:
    if isinstance(layer, QuantizedLinear):
        return layer.bias
    return checkpoint.get(f"{name}.bias") if f"{name}.bias" in checkpoint.reader.tensors else None


def _compare_bias(name: str, ours: Tensor | None, theirs: Tensor | None) -> Iterator[Finding]:
    if ours is not None and theirs is not None:
        yield from compare_values(f"{name}.bias", ours, theirs)
    elif ours is not None or theirs is not None:
        yield error(f"{name}.bias", "is on one side only")


def compare_values(name: str, ours: Tensor, theirs: Tensor) -> Iterator[Finding]:
    """Bit for bit; a difference that a plain cast explains is reported, not failed."""
    if ours.shape != theirs.shape:
        yield error(name, f"has shape {list(ours.shape)}, not {list(theirs.shape)}")
    elif same_bits(ours, theirs):
        return
    elif ours.dtype != theirs.dtype and same_bits(ours, theirs.to(ours.dtype)):
        yield note(name, f"was cast from {dtype_name(theirs.dtype)} to {dtype_name(ours.dtype)}")
    else:
        difference = (ours.double() - theirs.double()).abs()
        count = int((difference != 0).sum())
        yield error(name, f"{count} of {ours.numel()} values differ, by up to {float(difference.max()):.3g}")
