"""How far codes lie from the zeros beside them, which tells what the stored zeros mean.

Weights of a linear layer average to nearly nothing, so in a typical group the mean code is the zero-point: the median
over groups of (mean code - stored zero) is near 0 when zeros are stored as they are and near 1 when they are stored as
``z - 1``. It counts only where the difference hardly varies between groups: zeros that do not follow the codes say
nothing. Neither do groups whose zero lies at the end of the range under one of the conventions (weights of one sign
were clamped there) nor those with a negative scale, which a writer complemented.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import QuantizedLinear

__all__ = ["GroupOffsets", "Offset", "group_offsets", "summarize"]

MIN_GROUPS = 64
_MARGIN = 0.25  # of the median from a whole number
_MAX_ERROR = 0.1  # standard error of the median beyond which it says nothing
_MAX_SPREAD = 0.3  # standard deviation between groups; two kinds of groups, one apart, have 0.4 or more
_MAX_NOISE = 3.0  # or this many times what groups of so few codes vary by themselves
_SAMPLE = 2**20


@dataclass(frozen=True)
class GroupOffsets:
    """Of each group with a positive scale, flat.

    Attributes:
        differences: mean code minus stored zero, fp32.
        noise: the standard error of that mean, fp32.
        inside: bool, False where the zero lies at an end of the range.
    """

    differences: Tensor
    noise: Tensor
    inside: Tensor


@dataclass(frozen=True)
class Offset:
    """What many groups say together.

    Attributes:
        median: over the groups that tell; None when they are too few.
        spread: standard deviation between groups.
        nearest: the whole number near the median, None when there is none.
        firm: False when the groups differ too much to rely on ``nearest``.
    """

    median: float | None
    spread: float
    nearest: int | None
    firm: bool


def group_offsets(layer: QuantizedLinear) -> GroupOffsets:
    """The differences of one layer, whose ``zeros`` are the fields as stored."""
    index = layer.group_index()
    codes = layer.codes.float()
    sums = torch.zeros(layer.out_features, layer.groups).index_add_(1, index, codes)
    squares = torch.zeros_like(sums).index_add_(1, index, codes.square_())
    width = index.bincount(minlength=layer.groups)
    means = sums / width
    noise = (squares / width - means.square()).clamp(min=0).sqrt() / width.sqrt()
    ends = (layer.zeros == 0) | (layer.zeros >= layer.scheme.maxq - 1)  # z is 0 or maxq, raw or after adding 1
    counted = (layer.scales > 0) & (width > 0)
    return GroupOffsets((means - layer.zeros)[counted], noise[counted], ~ends[counted])


def summarize(parts: Sequence[GroupOffsets], *, constant: bool = False) -> Offset:
    """The median over several layers.

    Args:
        parts: what ``group_offsets`` found in each.
        constant: all zeros are one value, so every group counts and the spread says nothing about the convention.
    """
    differences = torch.cat([part.differences for part in parts]) if parts else torch.zeros(0)
    noise = torch.cat([part.noise for part in parts]) if parts else torch.zeros(0)
    inside = torch.cat([part.inside for part in parts]) if parts else torch.zeros(0, dtype=torch.bool)
    counted = differences if constant else differences[inside]
    spread = _spread(differences)
    if len(counted) < MIN_GROUPS:
        return Offset(None, spread, None, False)
    median = float(counted.median())
    near = abs(median - round(median)) <= _MARGIN
    certain = 1.25 * spread / len(counted) ** 0.5 <= _MAX_ERROR  # the median's standard error
    alike = spread <= max(_MAX_SPREAD, _MAX_NOISE * float(noise.median()))
    return Offset(median, spread, round(median) if near else None, certain and alike)


def _spread(offsets: Tensor) -> float:
    """Standard deviation, were they normal, by the tenth and the ninetieth percentile; a sample of very many."""
    if len(offsets) < MIN_GROUPS:
        return float("inf")
    ordered = offsets[:: len(offsets) // _SAMPLE + 1].sort().values
    tenth = len(ordered) // 10
    return float(ordered[-1 - tenth] - ordered[tenth]) / 2.563
