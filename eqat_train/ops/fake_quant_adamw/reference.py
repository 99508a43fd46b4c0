"""The step in plain torch: the quantizer's gradients, AdamW on each parameter, the quantizer again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..fake_quant.reference import fake_quant, gradients, stored_scales, stored_zeros

if TYPE_CHECKING:
    from . import AdamW, Moments

__all__ = ["fake_quant_adamw"]


@torch.no_grad()
def fake_quant_adamw(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    gradient: Tensor,
    dequantized: Tensor,
    moments: tuple[Moments | None, Moments | None, Moments | None],
    schedule: Tensor,
    step: Tensor,
    adamw: AdamW,
    bits: int,
    width: int,
    scale_dtype: torch.dtype,
    zero_range: tuple[int, int],
) -> None:
    """See :func:`eqat_train.ops.fake_quant_adamw.fake_quant_adamw_`; ``width`` is the group's width, never -1."""
    s = stored_scales(scales, scale_dtype).float()
    z = stored_zeros(zeros.clamp(*zero_range), bits)
    row = schedule.index_select(0, step.view(1)).squeeze(0)  # indexing by a tensor would wait for it
    parameters = (weight, scales, zeros)
    for index, (parameter, grad) in enumerate(zip(parameters, gradients(weight, s, z, bits, gradient), strict=True)):
        both = moments[index]
        if both is not None:
            _step(parameter, grad, both, row[index], row[3], row[4], adamw)
    dequantized.copy_(fake_quant(weight, scales, zeros.clamp(*zero_range), bits, width, scale_dtype))


def _step(
    parameter: Tensor, grad: Tensor, moments: Moments, rate: Tensor, bias1: Tensor, bias2: Tensor, adamw: AdamW
) -> None:
    parameter.mul_(1 - rate * adamw.weight_decay)
    moments.first.lerp_(grad, 1 - adamw.betas[0])
    moments.second.mul_(adamw.betas[1]).addcmul_(grad, grad, value=1 - adamw.betas[1])
    parameter.sub_(rate * bias1 * moments.first / (moments.second.sqrt().mul_(bias2).add_(adamw.eps)))
