"""Dequantization in plain torch; its two halves are shared by the other packed ops' references."""

from __future__ import annotations

import torch
from torch import Tensor

from formats.affine import expand_groups
from formats.packing import unpack_bits

from ..packed import PackedWeight

__all__ = ["apply_scales", "centered_codes", "dequant"]

WORD_BITS = 32


def dequant(packed: PackedWeight, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`eqat_train.ops.dequant.dequant`."""
    return apply_scales(packed, centered_codes(packed), scales, dtype)


def centered_codes(packed: PackedWeight) -> Tensor:
    """``q - z``: ``[out, in]`` int8, or int16 at 8 bits."""
    bits = packed.bits
    # words that bits fill completely are a dense stream, which unpacks in the shortest period
    per_word = None if WORD_BITS % bits == 0 else WORD_BITS // bits
    # transposing the words instead of the values moves 32 / bits times fewer elements
    codes = unpack_bits(packed.qweight.t(), bits, packed.in_features, per_word=per_word)  # [out, in] uint8
    zeros = unpack_bits(packed.qzeros, bits, packed.out_features, per_word=per_word).t()  # [out, groups] uint8
    signed = torch.int16 if bits == 8 else torch.int8
    codes, zeros = codes.to(signed), zeros.to(signed)
    if packed.whole_groups:
        return (codes.unflatten(1, (packed.groups, -1)) - zeros.unsqueeze(-1)).flatten(1)
    return codes - _per_column(packed, zeros)


def apply_scales(packed: PackedWeight, centered: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``centered * s`` ``[out, in]``, in float32 or wider ``scales`` ``[groups, out]``'s dtype, and rounded once."""
    rows = scales.t().to(torch.promote_types(scales.dtype, torch.float32))  # [out, groups]
    values = centered.to(rows.dtype)  # [out, in]
    if packed.whole_groups:
        weight = (values.unflatten(1, (packed.groups, -1)) * rows.unsqueeze(-1)).flatten(1)
    else:
        weight = values * _per_column(packed, rows)
    return weight.to(dtype)


def _per_column(packed: PackedWeight, values: Tensor) -> Tensor:
    """Per-group values over the input features: ``[out, groups]`` -> ``[out, in]``."""
    if packed.g_idx is None:
        return expand_groups(values, packed.in_features, packed.group_size)
    return values.index_select(1, packed.g_idx)
