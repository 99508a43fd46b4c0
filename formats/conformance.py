"""The round-trip proof: what came back, against what the format promised.

Used by the formats' tests and by ``eqat verify``. A layer passes when codes, zeros, scales, order and bias came back as
the exactness that the format declares for it demands; there is no tolerance besides the declared bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import dequantize
from .base import Exactness, Format
from .types import QuantizedLinear

__all__ = ["LayerComparison", "compare", "round_trip"]


@dataclass(frozen=True)
class LayerComparison:
    """One layer before and after.

    Attributes:
        exactness: what the format declares for this layer.
        codes_equal, zeros_equal, scales_equal: compared as numbers; None where the result has none (dense weights).
        bias_equal: as numbers; dense weights have theirs rounded to the weights' dtype.
        max_abs_weight_error: largest difference of dequantized fp32 weights.
        bound: largest difference the format allows anywhere in this layer; 0 unless it is ROUNDED.
        worst: row and column of the weight that goes farthest beyond its bound, or comes nearest to it.
        ok: the declaration holds.
    """

    exactness: Exactness
    codes_equal: bool | None
    zeros_equal: bool | None
    scales_equal: bool | None
    bias_equal: bool
    max_abs_weight_error: float
    bound: float
    worst: tuple[int, int]
    ok: bool


def compare(
    source: QuantizedLinear, result: QuantizedLinear | Tensor, fmt: Format, weight: Tensor | None = None
) -> LayerComparison:
    """Compares a layer with what was read back from ``fmt``.

    Args:
        source: the layer that was written.
        result: the layer read back, or its weight ``[out, in]`` where the format holds no codes.
        fmt: the format it was written in.
        weight: what the format's readers compute with, fp32 ``[out, in]``, where that is not ``(q - z) * s``.
    """
    bias = result.bias if isinstance(result, QuantizedLinear) else source.bias
    return _compare(source, result, fmt, bias, weight)


def round_trip(layer: QuantizedLinear, fmt: Format) -> LayerComparison:
    """Encodes, decodes and compares one layer."""
    tensors = fmt.encode(layer)
    if fmt.readable:
        decoded = fmt.decode(tensors, layer.scheme)
        return compare(layer, decoded, fmt, fmt.stored_weight(tensors, decoded))
    return _compare(layer, tensors["weight"], fmt, tensors.get("bias"))


def _compare(
    source: QuantizedLinear,
    result: QuantizedLinear | Tensor,
    fmt: Format,
    bias: Tensor | None,
    weight: Tensor | None = None,
) -> LayerComparison:
    if weight is None:
        weight = result.float() if isinstance(result, Tensor) else dequantize(result)
    expected = dequantize(source)
    exactness = fmt.exactness(source)
    if weight.shape != expected.shape:
        return LayerComparison(exactness, False, False, False, False, float("inf"), 0.0, (0, 0), False)
    error = (weight - expected).abs_()  # [out, in] fp32; NaN where a weight is not finite
    bound = fmt.bound(source) if exactness is Exactness.ROUNDED else torch.zeros(1, 1)
    excess = torch.where(error.isnan(), torch.inf, error - bound)
    codes_equal = zeros_equal = scales_equal = None
    same = True
    if isinstance(result, QuantizedLinear):
        codes_equal = torch.equal(source.codes, result.codes)
        zeros_equal = _equal(source.zeros, result.zeros)
        scales_equal = _equal(source.scales, result.scales)
        same = codes_equal and zeros_equal and scales_equal and torch.equal(source.group_index(), result.group_index())
    bias_equal = _same_bias(source.bias, bias, rounded=isinstance(result, Tensor))
    within = bool((excess <= 0).all())
    return LayerComparison(
        exactness,
        codes_equal,
        zeros_equal,
        scales_equal,
        bias_equal,
        float(error.max()),
        float(bound.max()),
        divmod(int(excess.argmax()), expected.shape[1]),
        ok=within and bias_equal and (same or exactness is not Exactness.EXACT),
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.double(), b.double())


def _same_bias(source: Tensor | None, result: Tensor | None, *, rounded: bool) -> bool:
    if source is None or result is None:
        return source is result
    return _equal(source.to(result.dtype) if rounded else source, result)
