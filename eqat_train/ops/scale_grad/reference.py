"""Scale gradients in plain torch, through the full ``dY^T X``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dequant.reference import centered_codes
from ..packed import PackedWeight

__all__ = ["reduce_groups", "scale_grad"]


def scale_grad(x: Tensor, grad_output: Tensor, packed: PackedWeight) -> Tensor:
    """See :func:`eqat_train.ops.scale_grad.scale_grad`."""
    return reduce_groups(packed, centered_codes(packed), x, grad_output)


def reduce_groups(packed: PackedWeight, centered: Tensor, x: Tensor, grad_output: Tensor) -> Tensor:
    """``(dY^T X) * centered`` summed over each group's columns: ``[groups, out]``."""
    precision = torch.promote_types(x.dtype, torch.float32)
    grad_weight = grad_output.reshape(-1, packed.out_features).t() @ x.reshape(-1, packed.in_features)  # [out, in]
    terms = grad_weight.to(precision) * centered  # [out, in]
    if packed.g_idx is not None:
        return terms.new_zeros(packed.out_features, packed.groups).index_add_(1, packed.g_idx, terms).t()
    if not packed.whole_groups:
        terms = F.pad(terms, (0, packed.groups * packed.group_size - packed.in_features))
    return terms.unflatten(1, (packed.groups, -1)).sum(dim=2).t()
