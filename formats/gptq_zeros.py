"""Which zero convention a GPTQ checkpoint really follows.

The label (``checkpoint_format``) says whether qzeros hold ``z - 1`` (v1) or ``z`` (v2), and labels are wrong in the
wild. The values tell: weights of a linear layer average to nearly nothing, so in a typical group the mean code is the
zero-point. The median over groups of (mean code - stored field) is near 0 for raw zeros and near 1 for v1. It counts
only where the difference hardly varies between groups: zeros that do not follow the codes say nothing. Neither do
groups whose zero lies at the end of the range under one of the conventions (weights of one sign were clamped there)
nor those with a negative scale, which a v1 writer complemented.

What cannot be told: how ``z = 0`` was wrapped in v1. Every word is valid under "each field modulo 2**bits" and under
"borrowed across the word", with different zeros; only the producer decides. See ``gptq.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError
from .gptq import GptqV1Format, GptqV2Format, producers
from .model import Checkpoint
from .packing import unpack_bits
from .types import QuantScheme

__all__ = ["ZeroDiagnosis", "diagnose_zeros"]

_MIN_GROUPS = 64
_MARGIN = 0.25  # of the median from 0 or 1
_MAX_ERROR = 0.1  # standard error of the median beyond which it says nothing
_MAX_SPREAD = 0.3  # standard deviation between groups; two kinds of groups, one apart, have 0.4 or more
_MAX_NOISE = 3.0  # or this many times what groups of so few codes vary by themselves
_SAMPLE = 2**20
_OFFSETS = {GptqV2Format.id: 0, GptqV1Format.id: 1}  # of the mean code from the stored field
_NAMES = {GptqV1Format.id: "v1, z - 1", GptqV2Format.id: "v2, raw z"}


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
        wrapped: fields that hold maxq under v1, where ``z = 0`` wrapped.
        evidence: one sentence for each observation.
        verdict: one sentence for a person.
    """

    label: str
    labelled: bool
    follows: str | None
    producers: dict[str, str]
    histogram: tuple[int, ...]
    offset: float | None
    wrapped: int
    evidence: tuple[str, ...]
    verdict: str

    @property
    def contradicted(self) -> bool:
        """True when the values say something else than the label."""
        return self.follows is not None and self.follows != self.label


def diagnose_zeros(checkpoint: Checkpoint, max_layers: int = 16) -> ZeroDiagnosis:
    """Looks at every layer's qzeros, and at the codes of up to ``max_layers`` layers spread over the model.

    Raises:
        InputError: the checkpoint is not GPTQ.
    """
    if not isinstance(checkpoint.format, GptqV2Format):
        raise InputError(f"{checkpoint.reader.folder} is not GPTQ; only GPTQ has two zero conventions")
    config = checkpoint.config
    told = config.get("checkpoint_format") or config.get("format")
    label = str(told).lower() if told else GptqV1Format.id
    step = max(1, -(-len(checkpoint.layer_names) // max_layers))
    histogram = torch.zeros(256, dtype=torch.int64)
    offsets, wrapped, symmetric = [], 0, set()
    for i, name in enumerate(checkpoint.layer_names):
        scheme = checkpoint.layer_scheme(name)
        fields = _stored_fields(checkpoint, name, scheme)
        histogram += fields.flatten().bincount(minlength=256)
        wrapped += int((fields == scheme.maxq).sum())
        negative = bool((checkpoint.get(f"{name}.scales") < 0).any())
        symmetric.add(None if negative else _symmetric_convention(fields, scheme))
        if i % step == 0:
            offsets.append(_offsets(checkpoint, name, scheme))
    same = symmetric.pop() if len(symmetric) == 1 else None
    differences, noise, inside = (torch.cat(parts) for parts in zip(*offsets, strict=True))
    offset = _median(differences if same is not None else differences[inside])
    spread = _spread(differences)
    counted = len(differences) if same is not None else int(inside.sum())
    near = next((fmt for fmt, value in _OFFSETS.items() if offset is not None and abs(offset - value) <= _MARGIN), None)
    follows = None
    evidence = []
    if same is not None:
        evidence.append(f"every field holds the symmetric zero of {_NAMES[same]}")
        follows = same if offset is None or near == same else None
    elif offset is not None and 1.25 * spread / counted**0.5 <= _MAX_ERROR:  # the median's standard error
        follows = near if spread <= max(_MAX_SPREAD, _MAX_NOISE * float(noise.median())) else None
    if offset is None:
        evidence.append(f"fewer than {_MIN_GROUPS} groups tell, too few to compare codes with zeros")
    else:
        evidence.append(
            f"mean code - stored zero is {offset:+.2f} in the median group, spread {spread:.2f}; v1 gives 1, v2 gives 0"
        )
    wrapped = wrapped if (follows or label) == GptqV1Format.id else 0
    found = producers(config)
    if found:
        writers = {"eqat": found["eqat"]} if "eqat" in found else found  # we list gptqmodel only for its version check
        evidence.append("written by " + ", ".join(f"{tool} {version}" for tool, version in writers.items()))
    if wrapped:
        evidence.append(f"{wrapped} fields hold maxq, where z = 0 wrapped: " + _wrap_reading(found))
    used = int(histogram.nonzero().max()) + 1
    return ZeroDiagnosis(
        label,
        bool(told),
        follows,
        found,
        tuple(histogram[:used].tolist()),
        offset,
        wrapped,
        tuple(evidence),
        _verdict(label, bool(told), follows, wrapped),
    )


def _stored_fields(checkpoint: Checkpoint, name: str, scheme: QuantScheme) -> Tensor:
    out_features = checkpoint.layer_shapes(name)["scales"][1]
    return unpack_bits(checkpoint.get(f"{name}.qzeros"), scheme.bits, out_features, axis=1)  # [groups, out]


def _symmetric_convention(fields: Tensor, scheme: QuantScheme) -> str | None:
    low, high = (int(bound) for bound in fields.aminmax())
    middle = 2 ** (scheme.bits - 1)
    return {middle: GptqV2Format.id, middle - 1: GptqV1Format.id}.get(low) if low == high else None


def _offsets(checkpoint: Checkpoint, name: str, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Of each group with a positive scale, flat: mean code minus stored field, the standard error of that mean, and
    whether the group tells a convention.
    """
    layer = GptqV2Format().decode(checkpoint.layer_tensors(name), scheme)  # zeros are the stored fields
    index = layer.group_index()
    codes = layer.codes.float()
    sums = torch.zeros(layer.out_features, layer.groups).index_add_(1, index, codes)
    squares = torch.zeros_like(sums).index_add_(1, index, codes.square_())
    width = index.bincount(minlength=layer.groups)
    means = sums / width
    noise = (squares / width - means.square()).clamp(min=0).sqrt() / width.sqrt()
    ends = (layer.zeros == 0) | (layer.zeros >= scheme.maxq - 1)  # z is 0 or maxq, raw or after adding 1
    positive = layer.scales >= 0
    return (means - layer.zeros)[positive], noise[positive], ~ends[positive]


def _median(offsets: Tensor) -> float | None:
    """None of too few."""
    return float(offsets.median()) if len(offsets) >= _MIN_GROUPS else None


def _spread(offsets: Tensor) -> float:
    """Standard deviation, were they normal, by the tenth and the ninetieth percentile; a sample of very many."""
    if len(offsets) < _MIN_GROUPS:
        return float("inf")
    ordered = offsets[:: len(offsets) // _SAMPLE + 1].sort().values
    tenth = len(ordered) // 10
    return float(ordered[-1 - tenth] - ordered[tenth]) / 2.563


def _wrap_reading(found: dict[str, str]) -> str:
    if "gptqmodel" in found and "eqat" not in found:
        return "gptqmodel borrows across the word at 2, 4 and 8 bits, and so it is read"
    return "read as 0; readers that add 1 to whole words get other zeros in the same word"


def _verdict(label: str, labelled: bool, follows: str | None, wrapped: int) -> str:
    said = f"labelled {label} ({_NAMES[label]})" if labelled else f"unlabelled, so readers assume {_NAMES[label]}"
    if follows is None:
        return f"{said}; the values do not tell which convention they follow"
    if follows != label:
        return f"{said}, but the values are {_NAMES[follows]}: set checkpoint_format and format to {follows!r}"
    tail = f", {wrapped} fields wrapped at z = 0, which readers decode differently" if wrapped else ", no field wraps"
    return f"{said}, and the values agree" + (tail if label == GptqV1Format.id else "")
