"""Values of single layers that readers stumble over: scales, zeros, group order, levels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from eqat_export.findings import Finding, error, note, warning
from eqat_export.tensors import dtype_name
from formats.model import Checkpoint
from formats.qweight import QweightFormat
from formats.types import QuantizedLinear
from formats.zero_offsets import GroupOffsets, group_offsets, summarize
from formats.zero_words import overrun_words

__all__ = ["ValueChecks"]

_HALF = torch.finfo(torch.float16)
_CAST_TO_HALF = ("gptq", "gptq_v2", "auto-round", "awq", "bitblas")  # their readers keep scales in a 16-bit dtype
_CLAMPED = 0.35  # share of codes at the end of the range; normal weights leave at most a quarter there
_OFFSET_LAYERS = 16
_FEWEST_LEVELS = 7  # maxq from which a group's mean tells one end of the range from the other


class ValueChecks:
    """Looks at one decoded layer after the other, then sums up.

    Args:
        checkpoint: what is being verified.
        one_convention: its format stores zeros in one way only, so codes beside them can be held against it.
    """

    def __init__(self, checkpoint: Checkpoint, *, one_convention: bool) -> None:
        self._checkpoint = checkpoint
        self._one_convention = one_convention
        self._form = checkpoint.format
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._offsets: list[GroupOffsets] = []
        self._constant_zeros: set[int] = set()
        self._step = max(1, len(checkpoint.layer_names) // _OFFSET_LAYERS)
        self._seen = 0

    def see(self, name: str, layer: QuantizedLinear) -> Iterator[Finding]:
        """What is wrong with this one layer."""
        tensors = self._small_tensors(name)
        self._see_scales(name, layer.scales)
        yield from _group_order(name, layer, tensors, self._checkpoint.layer_scheme(name).desc_act)
        if isinstance(self._form, QweightFormat) and "qzeros" in tensors:
            per_word = self._form.per_word(layer.scheme.bits)
            self._count(
                "overrun", name, overrun_words(tensors["qzeros"], layer.scheme.bits, layer.out_features, per_word)
            )
        self._see_levels(name, layer)
        self._count("wrapped", name, _wrapped_groups(layer))
        if self._one_convention and self._seen % self._step == 0:
            self._offsets.append(group_offsets(layer))
        low, high = (int(bound) for bound in layer.zeros.aminmax())
        self._constant_zeros |= {low, high}
        self._seen += 1

    def findings(self) -> Iterator[Finding]:
        """What is said once for the whole checkpoint."""
        counts = self._counts
        if counts["zero"]:
            yield warning("scales", f"{counts['zero']} groups have a scale of exactly zero: their weights are 0")
        if counts["negative"]:
            yield note("scales", f"{counts['negative']} groups have a negative scale (complemented codes)")
        if counts["subnormal"]:
            yield warning(
                "scales",
                f"{counts['subnormal']} groups have a float16 scale below {_HALF.smallest_normal:.2g}, where digits "
                f"are lost, e.g. in {self._first['subnormal']}",
            )
        yield from self._cast_findings()
        if counts["overrun"]:
            yield warning(
                "qzeros",
                f"{counts['overrun']} words end in a run of ones, e.g. in {self._first['overrun']}: a zero-point below "
                "0 was packed without a mask and overwrote its neighbours (EfficientQAT's packer does that); those "
                "groups are read as they are, and are not what was trained",
            )
        if counts["wrapped"]:
            yield warning(
                "zeros",
                f"{counts['wrapped']} groups have the largest zero-point beside codes that lie near 0, e.g. in "
                f"{self._first['wrapped']}: a zero-point of 0 from which 1 was taken before packing, as gptqmodel's "
                "issue 2350 had it; those groups are read as they are, far off",
            )
        if counts["clamped"]:
            yield error(
                "codes",
                f"{counts['clamped']} layers use only the upper half of their levels, with most codes at the end, "
                f"e.g. {self._first['clamped']}: levels were clamped before packing, as auto-round did for asymmetric "
                "compressed-tensors before its pull request 2273; quantize again",
            )
        yield from self._offset_findings()

    def _small_tensors(self, name: str) -> Mapping[str, Tensor]:
        shapes = self._checkpoint.layer_shapes(name)
        return {local: self._checkpoint.get(f"{name}.{local}") for local in ("g_idx", "qzeros") if local in shapes}

    def _count(self, what: str, name: str, number: int) -> None:
        if number:
            self._counts[what] += number
            self._first.setdefault(what, name)

    def _see_scales(self, name: str, scales: Tensor) -> None:
        self._count("zero", name, int((scales == 0).sum()))
        self._count("negative", name, int((scales < 0).sum()))
        sizes = scales.float().abs()
        if scales.dtype == torch.float16:
            self._count("subnormal", name, int(((sizes > 0) & (sizes < _HALF.smallest_normal)).sum()))
        if self._form is not None and self._form.id in _CAST_TO_HALF and scales.dtype != torch.float16:
            self._count(f"stored as {dtype_name(scales.dtype)}", name, 1)
            self._count("overflow", name, int((sizes > _HALF.max).sum()))
            self._count("rounded", name, int((scales.half().to(scales.dtype) != scales).sum()))
            self._counts["groups cast"] += scales.numel()

    def _cast_findings(self) -> Iterator[Finding]:
        counts = self._counts
        for dtype in ("float32", "bfloat16"):
            if counts[f"stored as {dtype}"]:
                lost = f"{counts['rounded']} of {counts['groups cast']} of them change"
                kept = "" if dtype == "float32" else "; bfloat16 itself keeps 8 bits of each"
                yield warning(
                    "scales", f"are {dtype}; {self._form_id()} readers cast them to float16, where {lost}{kept}"
                )
        if counts["overflow"]:
            yield error(
                "scales",
                f"{counts['overflow']} are beyond float16's {_HALF.max:g}, e.g. in {self._first['overflow']}, and "
                "become infinite in readers",
            )

    def _see_levels(self, name: str, layer: QuantizedLinear) -> None:
        half, maxq = 2 ** (layer.scheme.bits - 1), layer.scheme.maxq
        if int(layer.codes.min()) < half or layer.scheme.bits < 2:
            return
        self._count("clamped", name, int(float((layer.codes == maxq).float().mean()) > _CLAMPED))

    def _offset_findings(self) -> Iterator[Finding]:
        """Zeros one beside the codes."""
        summary = summarize(self._offsets, constant=len(self._constant_zeros) == 1)
        if not summary.firm or summary.nearest not in (1, -1) or summary.median is None:
            return
        yield warning(
            "zeros",
            f"lie one {'below' if summary.nearest == 1 else 'above'} the codes (mean code - zero is "
            f"{summary.median:+.2f} in the median group): packed from or as GPTQ's z - 1",
        )

    def _form_id(self) -> str:
        return self._form.id if self._form is not None else "dense"


def _wrapped_groups(layer: QuantizedLinear) -> int:
    """Groups whose zero is maxq and whose codes average below a third of it.

    A group with such a zero holds no positive weight, and the codes of small weights are close to the zero.
    """
    maxq = layer.scheme.maxq
    highest = layer.zeros == maxq  # [out, groups]
    if maxq < _FEWEST_LEVELS or not bool(highest.any()):
        return 0
    index = layer.group_index()
    found = 0
    for group in highest.any(0).nonzero().flatten().tolist():
        codes = layer.codes[highest[:, group]][:, index == group].float()
        found += int((codes.mean(1) < maxq / 3).sum())
    return found


def _group_order(
    name: str, layer: QuantizedLinear, tensors: Mapping[str, Tensor], configured: bool
) -> Iterator[Finding]:
    order = tensors.get("g_idx")
    if order is None:
        if configured:
            yield error(name, "desc_act is true and there is no g_idx: which group a feature belongs to is lost")
        return
    widths = order.long().bincount(minlength=layer.groups)
    usual = layer.scheme.width(layer.in_features)
    if layer.groups > 1 and int(widths[0]) == layer.in_features:
        yield error(name, f"g_idx is 0 throughout although there are {layer.groups} groups: a placeholder")
    elif bool((widths > usual).any()):
        worst = int(widths.argmax())
        yield warning(name, f"g_idx puts {int(widths[worst])} features into group {worst}; a group has {usual}")
    elif layer.scheme.desc_act and not configured:
        yield warning(
            name, "g_idx reorders the groups and desc_act is false: readers that go by desc_act ignore the order"
        )
