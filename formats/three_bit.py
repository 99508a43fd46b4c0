"""Which of the three 3-bit layouts of the field a ``qweight`` is in.

| layout | rows of qweight | 32 codes |
|---|---|---|
| ``dense``: GPTQ's stream | 3K/32 | one little-endian stream over 3 words |
| ``planar``: gptqmodel's ``gptq_p`` | 3K/32 | their low two bits in 2 words, then their high bits in one |
| ``native``: EfficientQAT's own | ceil(K/10) | ten a word, two bits of each word unused |

Rows tell native from the other two. Between dense and planar only the codes can tell. Codes of real weights crowd
around their group's mean; read in the other layout, bits of unrelated codes come together and the values spread like
uniform ones. So the layout whose reading has clearly the smaller variance within groups is the true one, provided that
the other reading looks uniform. Weights that are uniform themselves say nothing.

Source: ``utils/planar_packing.py`` of gptqmodel 7.6.0, ``quantize/int_linear_real.py`` of EfficientQAT.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .packing import packed_length, unpack_bits

__all__ = ["Layout", "layout_by_shape", "layout_by_values", "planar_codes"]

Layout = Literal["dense", "planar", "native"]

_BITS = 3
_BLOCK = 32
_NATIVE_PER_WORD = 10
_UNIFORM = (4**_BITS - 1) / 12  # variance of codes that are uniform on 0..7
_LOOKS_UNIFORM = 0.8  # of that variance, at least
_CLEARLY_SMALLER = 0.75  # of that variance and of the other reading's, at most
_ENOUGH = 2**12  # codes


def layout_by_shape(rows: int, in_features: int) -> tuple[Layout, ...]:
    """The layouts in which ``in_features`` 3-bit codes take ``rows`` words."""
    found: list[Layout] = []
    if in_features % _BLOCK == 0 and rows == packed_length(in_features, _BITS):
        found += ["dense", "planar"]
    if rows == packed_length(in_features, _BITS, per_word=_NATIVE_PER_WORD):
        found.append("native")
    return tuple(found)


def planar_codes(qweight: Tensor, in_features: int) -> Tensor:
    """Codes of a planar ``qweight``.

    Args:
        qweight: int32 ``[3 * in_features / 32, out_features]``.
        in_features: a multiple of 32.

    Returns:
        uint8 ``[out_features, in_features]``.
    """
    blocks = qweight.T.reshape(qweight.shape[1], in_features // _BLOCK, _BITS)  # [out, blocks, words]
    low = unpack_bits(blocks[..., :2], 2, _BLOCK)  # [out, blocks, 32]
    high = unpack_bits(blocks[..., 2:], 1, _BLOCK)
    return (low + high * 4).flatten(1)


def layout_by_values(qweight: Tensor, groups: Tensor) -> Layout | None:
    """``dense`` or ``planar`` by the spread of the codes; None where they leave it open.

    Args:
        qweight: int32 ``[3 * in_features / 32, out_features]``.
        groups: int64 ``[in_features]``, group of each input feature.
    """
    in_features = len(groups)
    if qweight.numel() * _BLOCK // _BITS < _ENOUGH:
        return None
    dense = _variance_within(unpack_bits(qweight.T, _BITS, in_features, axis=1), groups)
    planar = _variance_within(planar_codes(qweight, in_features), groups)
    readings: tuple[tuple[Layout, float, float], ...] = (("dense", dense, planar), ("planar", planar, dense))
    for layout, own, other in readings:
        if other >= _LOOKS_UNIFORM * _UNIFORM and own <= _CLEARLY_SMALLER * min(other, _UNIFORM):
            return layout
    return None


def _variance_within(codes: Tensor, groups: Tensor) -> float:
    """Mean over groups of the variance of their codes."""
    values = codes.float()
    count = groups.bincount().clamp(min=1)
    sums = torch.zeros(values.shape[0], len(count)).index_add_(1, groups, values)
    squares = torch.zeros_like(sums).index_add_(1, groups, values.square_())
    return float((squares / count - (sums / count).square()).mean())
