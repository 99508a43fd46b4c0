"""Launches the step's kernel; the same call as the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from ..fake_quant.triton import on_device, quantizer, tile
from ..fake_quant.triton import refusal as quantizer_refusal
from .kernel import step_kernel

if TYPE_CHECKING:
    from . import AdamW, Moments

__all__ = ["fake_quant_adamw", "refusal"]

# Fixed, not tuned: tuning would run the step, which changes what it is given. Of 256 to 2048 elements and 2 to 16 warps
# this is the fastest on an H200, 85 % of copy bandwidth.
ELEMENTS = 2048
WARPS = 4


def refusal(
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
) -> str | None:
    """Why the kernel cannot compute this, or None."""
    return quantizer_refusal(weight, scales, zeros, bits, width, scale_dtype, dequantized.dtype)


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
    shape = tile(width, ELEMENTS)
    pointers: list[Tensor | None] = []
    for parameter, both in zip((weight, scales, zeros), moments, strict=True):
        pointers += [parameter, *((None, None) if both is None else (both.first, both.second))]
    with on_device(weight):
        step_kernel[(triton.cdiv(scales.numel(), shape["ROWS"]),)](
            *pointers,
            gradient.contiguous(),
            dequantized,
            schedule,
            step,
            scales.numel(),
            ZERO_LOWEST=float(zero_range[0]),
            ZERO_HIGHEST=float(zero_range[1]),
            TRAIN_WEIGHT=moments[0] is not None,
            TRAIN_SCALES=moments[1] is not None,
            TRAIN_ZEROS=moments[2] is not None,
            BETA1=adamw.betas[0],
            BETA2=adamw.betas[1],
            EPS=adamw.eps,
            DECAY=adamw.weight_decay,
            **quantizer(bits, width, scale_dtype),
            **shape,
            num_warps=WARPS,
        )
