"""Packed layers built without the code under test: words from Python integers, weights in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eqat_train.ops.packed import PackedWeight

__all__ = ["PackedCase", "RandomCase", "make_case", "pack_words", "random_case"]


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


@dataclass
class RandomCase:
    """A large layer on the GPU: random words, and what they hold."""

    centered: Tensor  # q - z, float64 [out, in]
    scales: Tensor  # [groups, out] float32, exactly representable in float16
    index: Tensor  # [in] int64, group of each input feature
    packed: PackedWeight


def random_case(bits: int, group_size: int, out_features: int, in_features: int) -> RandomCase:
    """A layer of random words, unpacked by shifts in int64."""
    generator = torch.Generator(device="cuda").manual_seed(bits)
    width = in_features if group_size == -1 else group_size
    groups, per_word = math.ceil(in_features / width), 32 // bits
    index = torch.arange(in_features, device="cuda") // width

    def words(*shape: int) -> Tensor:
        used = 2 ** (per_word * bits)
        return torch.randint(used, shape, generator=generator, device="cuda", dtype=torch.int64)

    rows = words(math.ceil(in_features / per_word), out_features)
    zero_rows = words(groups, math.ceil(out_features / per_word))
    shifts = torch.arange(per_word, device="cuda") * bits
    codes = (rows.unsqueeze(1) >> shifts.view(1, -1, 1) & 2**bits - 1).flatten(0, 1)[:in_features]  # [in, out]
    zeros = (zero_rows.unsqueeze(2) >> shifts & 2**bits - 1).flatten(1)[:, :out_features]  # [groups, out]
    scales = torch.rand(groups, out_features, generator=generator, device="cuda") * 0.02 + 0.01
    packed = PackedWeight(rows.to(torch.int32), zero_rows.to(torch.int32), bits, group_size, in_features)
    return RandomCase((codes - zeros[index]).t().double(), scales.half().float(), index, packed)
