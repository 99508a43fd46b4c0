"""The layer without gradients as one operator, which ``torch.compile`` and ``torch.export`` do not look into."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import run
from ..packed import PackedWeight

__all__ = ["packed_linear"]


@torch.library.custom_op("eqat::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    impl: str,
) -> Tensor:
    """See :func:`eqat_train.ops.dequant_matmul.dequant_matmul`; the packed weight's fields are spelt out."""
    packed = PackedWeight(qweight, qzeros, bits, group_size, x.shape[-1], g_idx)
    return run("dequant_matmul", impl, x.device, x, packed, scales, bias)


@packed_linear.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    impl: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[1])
