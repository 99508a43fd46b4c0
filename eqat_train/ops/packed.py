"""The integers of a packed linear, as every packed op takes them.

Native layout: ``32 // bits`` values a word, low bits first, codes along the input features and zero-points along the
output features. The weight is ``w[n, k] = (q[n, k] - z[g, n]) * s[g, n]``, ``g`` the group of input feature ``k``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["PackedWeight"]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Packed codes and zero-points, and how to read them.

    Attributes:
        qweight: int32 ``[ceil(in / (32 // bits)), out]``.
        qzeros: int32 ``[groups, ceil(out / (32 // bits))]``.
        bits: 1 to 8.
        group_size: input features a group; -1 is the whole row. The last group may be short.
        in_features: columns of the weight, which the packed words may round up.
        g_idx: int32 ``[in]``, the group of each input feature, or None when groups are consecutive.
    """

    qweight: Tensor
    qzeros: Tensor
    bits: int
    group_size: int
    in_features: int
    g_idx: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.qweight.shape[1]

    @property
    def groups(self) -> int:
        """Groups a row."""
        return self.qzeros.shape[0]

    @property
    def whole_groups(self) -> bool:
        """True when groups are consecutive and all of the same length, so that a view splits them."""
        return self.g_idx is None and (self.group_size == -1 or self.in_features % self.group_size == 0)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same on another device."""
        g_idx = None if self.g_idx is None else self.g_idx.to(device)
        return replace(self, qweight=self.qweight.to(device), qzeros=self.qzeros.to(device), g_idx=g_idx)
