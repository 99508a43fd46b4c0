"""Rounding of weights that depend on nothing but their group and their code.

A group of 64 weights at 4 bits has 16 different ones, which are measured once instead of 64 times; that the worst of
them really occur is looked up in the codes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from eqat_export.rounding import Rounding
from formats.affine import dequantize
from formats.base import Format
from formats.packed import PackedLinear
from formats.types import QuantizedLinear

__all__ = ["measure_codes"]

_TABLE = 2**17  # entries that stay in a core's cache through several operations
_TRIES = 64


def measure_codes(
    form: Format, name: str, layer: QuantizedLinear | PackedLinear, dtype: torch.dtype, rounding: Rounding
) -> bool:
    """Adds what rounding to ``dtype`` did to a layer's weights.

    Returns:
        False, and nothing is added, where groups are too small or irregular for this to pay.

    Raises:
        CheckpointError: a value is beyond the dtype's range.
    """
    levels, width = 2**layer.scheme.bits, layer.scheme.width(layer.in_features)
    if layer.g_idx is not None or layer.in_features % width or 2 * levels > width:
        return False
    scheme = replace(layer.scheme, group_size=levels)
    found = Rounding()
    step = max(1, _TABLE // (layer.groups * levels))
    for start in range(0, layer.out_features, step):
        rows = slice(start, min(start + step, layer.out_features))
        some = layer.rows(rows)
        codes = torch.arange(levels, dtype=torch.uint8).repeat(some.out_features, layer.groups)
        table = QuantizedLinear(codes, some.scales, some.zeros, scheme)
        if not _measure_table(form, name, table, _Occurrence(some, levels, width), dtype, found):
            return False
    rounding.merge(found)
    rounding.tensors += 1
    return True


class _Occurrence:
    """Which entries of a table of ``[out, groups * levels]`` weights the codes of a layer really have."""

    def __init__(self, layer: QuantizedLinear | PackedLinear, levels: int, width: int) -> None:
        self._layer, self._levels, self._width = layer, levels, width

    def has(self, row: int, column: int) -> bool:
        group, code = divmod(column, self._levels)
        codes = self._layer.rows(slice(row, row + 1)).unpack().codes[0]
        return bool((codes[group * self._width : (group + 1) * self._width] == code).any())


def _measure_table(
    form: Format, name: str, table: QuantizedLinear, occurrence: _Occurrence, dtype: torch.dtype, found: Rounding
) -> bool:
    """Adds the worst entries that occur; False where too many worse ones do not."""
    exact = dequantize(table)
    error = exact.to(dtype).float().sub_(exact).abs_()
    share = error / exact.abs().clamp_(min=2.0**-149)
    relative = _worst(share, occurrence, found.relative)
    worst = _worst(error, occurrence, found.error)
    if worst is None or relative is None:
        return False
    for row, column in (place for place in (worst, relative) if place):
        one = exact[row : row + 1, column : column + 1]
        bound = form.bound(table.rows(slice(row, row + 1)))[:, column : column + 1]
        found.add(name, one, one.to(dtype), partial(_same, bound))
    return True


def _same(bound: Tensor, row: int) -> Tensor:
    return bound


def _worst(values: Tensor, occurrence: _Occurrence, known: float) -> tuple[int, int] | tuple[()] | None:
    """Where the largest value stands that occurs and is larger than what is known; () if there is none, None if
    that takes too many tries. Values that do not occur are overwritten.
    """
    for _ in range(_TRIES):
        if float(values.max()) <= known:  # much faster than argmax, and nearly always so; not so for NaN
            return ()
        row, column = divmod(int(values.argmax()), values.shape[1])
        if occurrence.has(row, column):
            return row, column
        values[row, column] = -1
    return None
