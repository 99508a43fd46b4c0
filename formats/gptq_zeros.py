"""Which zero convention a GPTQ checkpoint really follows.

The label (``checkpoint_format``, in auto-round ``packing_format``) says whether qzeros hold ``z - 1`` (v1) or ``z``
(v2), and labels are wrong in the wild. The values tell, by the offset of codes from stored zeros (``zero_offsets.py``).

What cannot be told: how ``z = 0`` was wrapped in v1. Every word is valid under "each field modulo 2**bits" and under
"borrowed across the word", with different zeros; only the producer decides. See ``gptq.md``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .gptq import GptqV1Format, GptqV2Format, producers
from .model import Checkpoint
from .packing import unpack_bits
from .types import QuantScheme
from .zero_offsets import MIN_GROUPS, GroupOffsets, Offset, group_offsets, summarize

__all__ = ["ZeroDiagnosis", "diagnose_zeros", "has_zero_label", "wraps_by_word", "zero_label"]

_OFFSETS = {0: GptqV2Format.id, 1: GptqV1Format.id}  # of the mean code from the stored field
_NAMES = {GptqV1Format.id: "v1, z - 1", GptqV2Format.id: "v2, raw z"}
# auto_round/inference/backend.py of auto-round 0.16.1: GPTQ_FORMAT and GPTQ_FORMAT_NO_ZP, with the aliases that
# inference/convert_model.py resolves.
_PACKING_FORMATS = {
    "auto_round:auto_gptq": GptqV1Format.id,
    "auto_round:gptq": GptqV1Format.id,
    "auto": GptqV1Format.id,
    "auto_round:gptqmodel": GptqV2Format.id,
    "auto_round": GptqV2Format.id,
}


@dataclass(frozen=True)
class ZeroDiagnosis:
    """What a GPTQ checkpoint's qzeros hold.

    Attributes:
        label: ``gptq`` or ``gptq_v2``, as configured; ``gptq`` where nothing is, as readers assume.
        labelled: False when the configuration says neither.
        follows: what the values say, None when they leave it open.
        producers: tool -> version from ``meta.quantizer``.
        histogram: how often each stored field value occurs.
        offset: median over groups of (mean code - stored field), None when too few groups were seen.
        symmetric: the convention under which every field is the middle of the range, None when there is none.
        wrapped: fields that hold maxq under v1, where ``z = 0`` wrapped.
        by_file: weight file -> what its values say, for the files that tell.
        evidence: one sentence for each observation.
        verdict: one sentence for a person.
    """

    label: str
    labelled: bool
    follows: str | None
    producers: dict[str, str]
    histogram: tuple[int, ...]
    offset: float | None
    symmetric: str | None
    wrapped: int
    by_file: dict[str, str]
    evidence: tuple[str, ...]
    verdict: str

    @property
    def contradicted(self) -> bool:
        """True when the values say something else than the label."""
        return self.follows is not None and self.follows != self.label


def has_zero_label(config: Mapping[str, Any]) -> bool:
    """True for a configuration that names, or leaves open, one of the two conventions."""
    method = str(config.get("quant_method", "gptq")).lower()
    if "auto-round" in method:
        return str(config.get("packing_format", "auto")) in _PACKING_FORMATS
    return method == "gptq"


def zero_label(config: Mapping[str, Any]) -> str | None:
    """``gptq`` or ``gptq_v2`` as configured; None where nothing is, which readers take for ``gptq``."""
    if "auto-round" in str(config.get("quant_method", "")).lower():
        return _PACKING_FORMATS.get(str(config.get("packing_format", "")))
    told = config.get("checkpoint_format") or config.get("format")
    return str(told).lower() if told else None


def diagnose_zeros(checkpoint: Checkpoint, max_layers: int = 16) -> ZeroDiagnosis:
    """Looks at every layer's qzeros, and at the codes of up to ``max_layers`` layers spread over model and files.

    Raises:
        InputError: the checkpoint is not GPTQ, nor auto-round in GPTQ's layout.
    """
    if not isinstance(checkpoint.format, GptqV2Format) and not (
        checkpoint.format is not None and checkpoint.format.id == "auto-round" and has_zero_label(checkpoint.config)
    ):
        raise InputError(f"{checkpoint.reader.folder} is not GPTQ; only GPTQ has two zero conventions")
    config = checkpoint.config
    told = zero_label(config)
    label = told or GptqV1Format.id
    step = max(1, -(-len(checkpoint.layer_names) // max_layers))
    histogram = torch.zeros(256, dtype=torch.int64)
    offsets: dict[str, list[GroupOffsets]] = defaultdict(list)
    wrapped, symmetric = 0, defaultdict(set)
    for i, name in enumerate(checkpoint.layer_names):
        scheme, file = checkpoint.layer_scheme(name), checkpoint.reader.tensors[f"{name}.qzeros"].shard
        fields = _stored_fields(checkpoint, name, scheme)
        histogram += fields.flatten().bincount(minlength=256)
        wrapped += int((fields == scheme.maxq).sum())
        negative = bool((checkpoint.get(f"{name}.scales") < 0).any())
        symmetric[file].add(None if negative else _symmetric_convention(fields, scheme))
        if i % step == 0 or file not in offsets:
            layer = GptqV2Format().decode(checkpoint.layer_tensors(name), scheme)  # zeros are the stored fields
            offsets[file].append(group_offsets(layer))
    constants = set().union(*symmetric.values())
    same = constants.pop() if len(constants) == 1 else None
    summary = summarize([part for parts in offsets.values() for part in parts], constant=same is not None)
    follows = _follows(summary, same)
    evidence = [_offset_sentence(summary)]
    if same is not None:
        evidence.insert(0, f"every field holds the symmetric zero of {_NAMES[same]}")
    wrapped = wrapped if (follows or label) == GptqV1Format.id else 0
    found = producers(config)
    if found:
        writers = {"eqat": found["eqat"]} if "eqat" in found else found  # we list gptqmodel only for its version check
        evidence.append("written by " + ", ".join(f"{tool} {version}" for tool, version in writers.items()))
    if wrapped:
        evidence.append(f"{wrapped} fields hold maxq, where z = 0 wrapped: " + _wrap_reading(config))
    used = int(histogram.nonzero().max()) + 1
    return ZeroDiagnosis(
        label,
        told is not None,
        follows,
        found,
        tuple(histogram[:used].tolist()),
        summary.median,
        same,
        wrapped,
        _by_file(offsets, symmetric),
        tuple(evidence),
        _verdict(label, told is not None, follows, wrapped, "packing_format" in config),
    )


def _follows(summary: Offset, same: str | None) -> str | None:
    near = None if summary.nearest is None else _OFFSETS.get(summary.nearest)
    if same is not None:
        return same if summary.median is None or near == same else None
    return near if summary.firm else None


def _by_file(offsets: Mapping[str, list[GroupOffsets]], symmetric: Mapping[str, set[str | None]]) -> dict[str, str]:
    found = {}
    for file, parts in offsets.items():
        same = next(iter(symmetric[file])) if len(symmetric[file]) == 1 else None
        follows = _follows(summarize(parts, constant=same is not None), same)
        if follows is not None:
            found[file] = follows
    return found


def _offset_sentence(summary: Offset) -> str:
    if summary.median is None:
        return f"fewer than {MIN_GROUPS} groups tell, too few to compare codes with zeros"
    return (
        f"mean code - stored zero is {summary.median:+.2f} in the median group, spread {summary.spread:.2f}; "
        "v1 gives 1, v2 gives 0"
    )


def _stored_fields(checkpoint: Checkpoint, name: str, scheme: QuantScheme) -> Tensor:
    out_features = checkpoint.layer_shapes(name)["scales"][1]
    return unpack_bits(checkpoint.get(f"{name}.qzeros"), scheme.bits, out_features, axis=1)  # [groups, out]


def _symmetric_convention(fields: Tensor, scheme: QuantScheme) -> str | None:
    low, high = (int(bound) for bound in fields.aminmax())
    middle = 2 ** (scheme.bits - 1)
    return {middle: GptqV2Format.id, middle - 1: GptqV1Format.id}.get(low) if low == high else None


def wraps_by_word(config: Mapping[str, Any]) -> bool:
    """True for producers that let ``z = 0`` borrow from the next field of its word at 2, 4 and 8 bits."""
    return _borrower(config) is not None


def _borrower(config: Mapping[str, Any]) -> str | None:
    if "auto-round" in str(config.get("quant_method", "")).lower():
        return "auto-round before its pull request 2273"
    found = producers(config)
    return "gptqmodel" if "gptqmodel" in found and "eqat" not in found else None


def _wrap_reading(config: Mapping[str, Any]) -> str:
    borrower = _borrower(config)
    if borrower is not None:
        return f"{borrower} borrows across the word at 2, 4 and 8 bits, and so it is read"
    return "read as 0; readers that add 1 to whole words get other zeros in the same word"


def _verdict(label: str, labelled: bool, follows: str | None, wrapped: int, packing_format: bool) -> str:
    said = f"labelled {label} ({_NAMES[label]})" if labelled else f"unlabelled, so readers assume {_NAMES[label]}"
    if follows is None:
        return f"{said}; the values do not tell which convention they follow"
    if follows != label:
        value = "auto_round:auto_gptq" if follows == GptqV1Format.id else "auto_round:gptqmodel"
        fix = f"packing_format to {value!r}" if packing_format else f"checkpoint_format and format to {follows!r}"
        return f"{said}, but the values are {_NAMES[follows]}: set {fix}"
    tail = f", {wrapped} fields wrapped at z = 0, which readers decode differently" if wrapped else ", no field wraps"
    return f"{said}, and the values agree" + (tail if label == GptqV1Format.id else "")
