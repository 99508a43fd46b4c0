"""Which block type holds a layer's integers, and the layer in that type.

A block type holds ``q - z`` of a group as it is or, with the scale negated, as ``z - q``: the identity
``(q, s, z) -> (maxq - q, -s, maxq - z)``. What a type cannot hold is moved to the nearest end of its range, which only
happens where the type was forced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedSchemeError
from ..packed import PackedLinear
from ..types import QuantizedLinear, QuantScheme
from .blocks import WRITABLE, BlockType

__all__ = ["Fit", "TypeChoice", "choose", "fit", "integers", "refusal", "within"]

_FIRST_ROWS = 64  # looked at before the whole layer is: most layers that do not fit show it at once


@dataclass(frozen=True)
class TypeChoice:
    """Why a tensor has its type.

    Attributes:
        type: name of the block type.
        bits_per_weight: of the type.
        reason: one phrase, e.g. "every zero is 1 or 2".
        exact: the integers are held as they are; scales are another matter.
    """

    type: str
    bits_per_weight: float
    reason: str
    exact: bool = True


@dataclass(frozen=True)
class Fit:
    """How a type holds a layer.

    Attributes:
        flip: bool ``[out, groups]``, True where the group is complemented.
        excess: int32 ``[out, groups]``, by how many steps the farthest integer lies outside the type's range; None
            where none does.
    """

    flip: Tensor
    excess: Tensor | None

    @property
    def exact(self) -> bool:
        """Every integer lies within the range."""
        return self.excess is None


def refusal(kind: BlockType, scheme: QuantScheme, in_features: int) -> str | None:
    """Why a type cannot hold layers of this scheme and width whatever their values; None if it can."""
    width = scheme.width(in_features)
    if in_features % kind.block:
        return f"{in_features} in_features, {kind.name} has blocks of {kind.block}"
    if width % kind.block:
        return f"groups of {width}, {kind.name} has blocks of {kind.block}"
    return None


def choose(layer: QuantizedLinear | PackedLinear) -> tuple[TypeChoice, Fit]:
    """The smallest type that holds every integer of a layer, and how.

    Raises:
        UnsupportedSchemeError: none does.
    """
    why = ""
    for kind in WRITABLE:
        problem = refusal(kind, layer.scheme, layer.in_features)
        found = _exact_fit(layer, kind) if problem is None else None
        if found is not None:
            return TypeChoice(kind.name, kind.bits_per_weight, why or within(kind)), found
        why = problem or f"q - z beyond {kind.name}'s {kind.low}..{kind.high}"
    raise UnsupportedSchemeError(
        f"{layer.scheme}: no block type holds its integers ({why}); force the nearest with --gguf-type Q8_0, or use "
        "--to native"
    )


def within(kind: BlockType) -> str:
    """The reason where the smallest type will do."""
    return f"every q - z within {kind.low}..{kind.high}"


def fit(layer: QuantizedLinear | PackedLinear, kind: BlockType) -> Fit:
    """How ``kind`` holds a layer, from its zeros where they suffice and from its codes where not."""
    zeros, maxq = layer.zeros, layer.scheme.maxq
    low, high = (int(end) for end in zeros.aminmax())
    values = torch.arange(low, high + 1, dtype=torch.int32)  # a zero-point alone tells what the codes may reach
    by_zeros = _fit(kind, -values, maxq - values)
    if by_zeros.exact:
        flip = torch.zeros_like(zeros, dtype=torch.bool)
        for value in values[by_zeros.flip].tolist():
            flip |= zeros == value
        return Fit(flip, None)
    width = layer.scheme.width(layer.in_features)
    least, most = layer.unpack().codes.view(layer.out_features, layer.groups, width).aminmax(dim=2)
    return _fit(kind, least.int() - zeros, most.int() - zeros)


def integers(layer: QuantizedLinear, kind: BlockType, found: Fit) -> Tensor:
    """A layer's integers in a type: codes uint8 ``[out, in]``, each below ``2 ** kind.bits``.

    Args:
        layer: any.
        kind: the type.
        found: how it holds the layer.
    """
    flip, zeros = found.flip, layer.zeros
    width = layer.scheme.width(layer.in_features)
    codes = layer.codes.view(layer.out_features, layer.groups, width)
    if not found.exact:  # the integers, moved to the nearest end of the range
        sign = torch.where(flip, -1, 1).to(torch.int16)[..., None]
        steps = (codes.to(torch.int16) - zeros.to(torch.int16)[..., None]).mul_(sign)
        shifted = steps.clamp_(kind.low, kind.high).sub_(kind.low).to(torch.uint8)
    elif bool(flip.any()):  # z - q = ~q + z + 1, modulo 256 like all that follows
        shifted = (codes ^ (flip.to(torch.uint8) * 0xFF)[..., None]).add_(
            _bytes(torch.where(flip, zeros + 1, -zeros) - kind.low)
        )
    else:
        shifted = codes + _bytes(-zeros - kind.low)
    return shifted.view(layer.out_features, layer.in_features)


def _bytes(values: Tensor) -> Tensor:
    """int32 ``[out, groups]`` modulo 256, to be added to the codes of a group."""
    return values.to(torch.uint8)[..., None]


def _fit(kind: BlockType, low: Tensor, high: Tensor) -> Fit:
    """From the smallest and largest integer of each group, int32 ``[out, groups]``."""
    plain = torch.maximum(kind.low - low, high - kind.high)
    flipped = torch.maximum(kind.low + high, -low - kind.high)
    flip = (plain > 0) & (flipped < plain)
    excess = torch.where(flip, flipped, plain).clamp_(min=0)
    return Fit(flip, excess if bool(excess.any()) else None)


def _exact_fit(layer: QuantizedLinear | PackedLinear, kind: BlockType) -> Fit | None:
    """How a type holds every integer, None if it does not; a few rows are looked at before all of them."""
    if not fit(layer.rows(slice(0, _FIRST_ROWS)), kind).exact:
        return None
    found = fit(layer, kind)
    return found if found.exact else None
