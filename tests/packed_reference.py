"""Packed layers built without the code under test: words from Python integers, weights in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eqat_train.ops.packed import PackedWeight

__all__ = ["PackedCase", "make_case", "pack_words"]


def pack_words(rows: list[list[int]], bits: int) -> Tensor:
    """Each row as int32 words of ``32 // bits`` values, low bits first, by Python integer arithmetic."""
    per_word = 32 // bits
    words = [
        [sum(v << (bits * j) for j, v in enumerate(row[i : i + per_word])) for i in range(0, len(row), per_word)]
        for row in rows
    ]
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


@dataclass
class PackedCase:
    """A layer's packed tensors (native layout) and the integers they were made of."""

    codes: Tensor  # [out, in] int64
    zeros: Tensor  # [out, groups] int64
    scales: Tensor  # [groups, out] float64, exactly representable in float16
    index: Tensor  # [in] int64, group of each input feature
    packed: PackedWeight

    def centered(self) -> Tensor:
        """``q - z`` as float64 ``[out, in]``."""
        return (self.codes - self.zeros[:, self.index]).double()

    def weight(self, scales: Tensor) -> Tensor:
        """``(q - z) * s`` in the dtype of ``scales`` ``[groups, out]``: ``[out, in]``."""
        return self.centered().to(scales.dtype) * scales.t()[:, self.index]


def make_case(
    bits: int, group_size: int, out_features: int, in_features: int, *, act_order: bool = False, seed: int = 0
) -> PackedCase:
    generator = torch.Generator().manual_seed(seed)
    width = in_features if group_size == -1 else group_size
    groups = math.ceil(in_features / width)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator)
    zeros = torch.randint(0, 2**bits, (out_features, groups), generator=generator)
    zeros[0], zeros[-1] = 0, 2**bits - 1
    scales = (torch.rand(groups, out_features, generator=generator) * 0.02 + 0.01).half().double()
    scales[:, 1] *= -1
    index = torch.arange(in_features) // width
    if act_order:
        index = index[torch.randperm(in_features, generator=generator)]
    return PackedCase(
        codes,
        zeros,
        scales,
        index,
        PackedWeight(
            pack_words(codes.tolist(), bits).t().contiguous(),
            pack_words(zeros.t().tolist(), bits),
            bits,
            group_size,
            in_features,
            index.int() if act_order else None,
        ),
    )
