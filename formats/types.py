"""The canonical quantized layer: integers and scales, before any packing.

``w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g]`` with ``g = g_idx[k]``, or ``k // group_size``
when there is no ``g_idx``. Every format encodes from and decodes to this layer, so a conversion between
two formats never re-quantizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidLayerError

__all__ = ["GroupedLayer", "QuantScheme", "QuantizedLinear", "all_equal", "by_group", "negated"]

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_BITS = 8


@dataclass(frozen=True)
class QuantScheme:
    """How a linear layer's weight is quantized.

    Attributes:
        bits: bits per code, 1 to 8.
        group_size: input features that share one scale and zero-point; -1 means the whole row.
        sym: True when every zero-point is ``2 ** (bits - 1)``.
        desc_act: True when ``g_idx`` assigns input features to groups in another order (GPTQ act-order).
    """

    bits: int
    group_size: int
    sym: bool = False
    desc_act: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= MAX_BITS:
            raise InvalidLayerError(f"bits is {self.bits!r}; allowed are the integers 1 to {MAX_BITS}")
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0):
            raise InvalidLayerError(f"group_size is {size!r}; allowed are -1 (one group a row) and positive integers")

    @property
    def maxq(self) -> int:
        """Largest code, ``2 ** bits - 1``."""
        return 2**self.bits - 1

    def width(self, in_features: int) -> int:
        """Input features in a full group of a row of ``in_features``."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups in a row of ``in_features``; the last one may be short."""
        return math.ceil(in_features / self.width(in_features))

    def __str__(self) -> str:
        flags = (" sym" if self.sym else "") + (" desc_act" if self.desc_act else "")
        return f"w{self.bits}g{self.group_size}{flags}"


class GroupedLayer:
    """What a layer has whichever way its codes are held: scales, zeros, scheme, and perhaps a bias and an order."""

    scales: Tensor
    zeros: Tensor
    scheme: QuantScheme
    bias: Tensor | None
    g_idx: Tensor | None
    in_features: int

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.scales.shape[0]

    @property
    def groups(self) -> int:
        """Groups a row."""
        return self.scales.shape[1]

    def group_index(self) -> Tensor:
        """Group of each input feature, int64 ``[in_features]``."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.in_features, device=self.scales.device) // self.scheme.width(self.in_features)

    def check_parameters(self, out_features: int) -> None:
        """Raises InvalidLayerError for a shape, dtype or value that contradicts the scheme."""
        expected = (out_features, self.scheme.groups(self.in_features))
        _check_tensor("scales", self.scales, SCALE_DTYPES, expected)
        _check_tensor("zeros", self.zeros, (torch.int32,), expected)
        _check_range("zeros", self.zeros, self.scheme.maxq, self.scheme)
        low, high = self.scales.aminmax()  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InvalidLayerError("scales hold NaN or infinity; every scale must be finite")
        if self.bias is not None:
            _check_tensor("bias", self.bias, (*SCALE_DTYPES, torch.float64), (out_features,))
        if self.scheme.sym and not all_equal(self.zeros, 2 ** (self.scheme.bits - 1)):
            raise InvalidLayerError(
                f"sym is set but zeros differ from {2 ** (self.scheme.bits - 1)}; build the scheme with sym=False"
            )
        if (self.g_idx is not None) != self.scheme.desc_act:
            raise InvalidLayerError(
                "desc_act and g_idx contradict each other; give g_idx exactly when desc_act is True"
            )
        if self.g_idx is not None:
            _check_tensor("g_idx", self.g_idx, (torch.int32,), (self.in_features,))
            _check_range("g_idx", self.g_idx, self.scheme.groups(self.in_features) - 1, self.scheme)

    def complemented_parameters(self, where: Tensor) -> dict[str, Any]:
        """Scales, zeros and scheme of the same weights with the groups in ``where`` complemented."""
        return {
            "scales": negated(self.scales, where),
            "zeros": self.complemented_zeros(where),
            "scheme": replace(self.scheme, sym=self.scheme.sym and not bool(where.any())),
        }

    def complemented_zeros(self, where: Tensor) -> Tensor:
        """Zeros with those of the groups in ``where`` complemented, int32 ``[out, groups]``."""
        return self.zeros ^ where.to(torch.int32).mul_(self.scheme.maxq)  # maxq - z is z with every bit turned over


@dataclass(frozen=True, eq=False)
class QuantizedLinear(GroupedLayer):
    """One quantized linear layer, validated when built.

    Attributes:
        codes: uint8 ``[out_features, in_features]``, each 0..maxq.
        scales: float16, bfloat16 or float32 ``[out_features, groups]``, finite.
        zeros: int32 ``[out_features, groups]``, each 0..maxq.
        scheme: bits, group_size, sym, desc_act.
        bias: floating ``[out_features]`` or None.
        g_idx: int32 ``[in_features]``, each 0..groups-1, or None when groups are consecutive.

    Raises:
        InvalidLayerError: a shape, dtype or value that contradicts the scheme.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: QuantScheme
    bias: Tensor | None = None
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8 or not self.codes.numel():
            raise InvalidLayerError(
                f"codes are {self.codes.dtype} {list(self.codes.shape)}; expected non-empty uint8 [out, in]"
            )
        if self.scheme.bits < 8:
            _check_range("codes", self.codes, self.scheme.maxq, self.scheme)
        self.check_parameters(self.codes.shape[0])

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Columns of the weight."""
        return self.codes.shape[1]

    def rows(self, rows: slice) -> QuantizedLinear:
        """The layer of some of the outputs, without its bias."""
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=self.zeros[rows], bias=None)

    def unpack(self) -> QuantizedLinear:
        """Itself; a PackedLinear answers with its codes unpacked."""
        return self

    def row_blocks(self, weights: int = 2**18) -> Iterator[tuple[slice, QuantizedLinear]]:
        """The layer a few rows at a time, without its bias; by default what fits in a core's cache.

        Yields:
            the rows, and a layer of these rows.
        """
        step = max(weights // self.in_features, 1)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            yield rows, self.rows(rows)

    def complement(self, where: Tensor) -> QuantizedLinear:
        """The same weights from ``(maxq - q, -s, maxq - z)`` in the chosen groups.

        Negation is exact, so dequantized weights are equal; where ``q == z`` a zero changes its sign.

        Args:
            where: bool ``[out_features, groups]``, True where a group is to be complemented.
        """
        flips = where.to(torch.uint8) * self.scheme.maxq  # maxq - q is q with every bit flipped
        codes = self.codes.clone()
        if self.g_idx is not None:
            codes ^= flips[:, self.group_index()]
        else:
            for view, groups in by_group(codes, self.scheme.width(self.in_features)):
                view.bitwise_xor_(flips[:, groups, None])
        return replace(self, codes=codes, **self.complemented_parameters(where))


def by_group(values: Tensor, width: int) -> Iterator[tuple[Tensor, slice]]:
    """Views of ``[out, in]`` values as ``[out, groups, width]``: the full groups, then a short last one.

    Yields:
        a view and the groups it covers.
    """
    full = values.shape[1] // width
    if full:
        yield values[:, : full * width].unflatten(1, (full, width)), slice(0, full)
    if values.shape[1] > full * width:
        yield values[:, full * width :].unflatten(1, (1, -1)), slice(full, full + 1)


def negated(scales: Tensor, where: Tensor) -> Tensor:
    """Scales with another sign where chosen."""
    return scales * (1 - 2 * where.to(scales.dtype))  # exact, and much faster than torch.where


def all_equal(values: Tensor, number: int) -> bool:
    """True when every value is this number."""
    low, high = values.aminmax()
    return int(low) == number == int(high)


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InvalidLayerError(f"{name} are {tensor.dtype}; allowed are {allowed}")
    if tuple(tensor.shape) != shape:
        raise InvalidLayerError(f"{name} have shape {list(tensor.shape)}; expected {list(shape)}")


def _check_range(name: str, tensor: Tensor, highest: int, scheme: QuantScheme) -> None:
    low, high = (int(bound) for bound in tensor.aminmax())
    if low < 0 or high > highest:
        raise InvalidLayerError(f"{name} span {low}..{high}; {scheme} allows 0..{highest}")
