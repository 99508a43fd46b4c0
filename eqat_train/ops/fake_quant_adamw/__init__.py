"""One AdamW step of a fake-quantized weight with its scales and zero-points, and the weight that the next step uses.

Separately, the quantizer's backward pass, AdamW and the next forward pass read and write 38 bytes a weight and keep an
fp32 gradient; together they are one pass of 28 bytes, which is what AdamW alone takes, and no fp32 gradient exists.

Gradients are those of :mod:`eqat_train.ops.fake_quant`. AdamW (decoupled weight decay) is torch's: with learning rate
``lr`` and step ``t`` from 1,

    p -= lr * weight_decay * p
    m = beta1 * m + (1 - beta1) * g        v = beta2 * v + (1 - beta2) * g**2
    p -= lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import InputError

from ..dispatch import run

__all__ = ["AdamW", "Moments", "fake_quant_adamw_", "schedule_row"]


@dataclass(frozen=True)
class AdamW:
    """What stays the same through a training."""

    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class Moments:
    """AdamW's two moments of a parameter, fp32 and of its shape."""

    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, parameter: Tensor) -> Moments:
        """Both zero."""
        return cls(torch.zeros_like(parameter), torch.zeros_like(parameter))


def schedule_row(step: int, rates: Sequence[float], adamw: AdamW) -> list[float]:
    """One row of the schedule: rates of weight, scales and zeros, ``1 / (1 - beta1**t)``, ``1 / sqrt(1 - beta2**t)``.

    Args:
        step: from 0.
        rates: the three learning rates.
        adamw: the betas are used.
    """
    beta1, beta2 = adamw.betas
    return [*rates, 1 / (1 - beta1 ** (step + 1)), 1 / math.sqrt(1 - beta2 ** (step + 1))]


def fake_quant_adamw_(
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
    group_size: int,
    scale_dtype: torch.dtype = torch.float16,
    zero_range: tuple[int, int] | None = None,
    *,
    impl: str = "auto",
) -> None:
    """Updates weight, scales, zeros and their moments in place, and overwrites ``dequantized``.

    Nothing waits for the device, so a CUDA graph can hold the call.

    Args:
        weight: fp32 ``[out, in]``.
        scales: fp32 ``[out, groups]``.
        zeros: fp32 ``[out, groups]``.
        gradient: of ``dequantized``, ``[out, in]`` in any floating dtype.
        dequantized: ``[out, in]``; becomes ``fake_quant`` of the updated parameters in its own dtype.
        moments: of weight, scales and zeros; None for those that stay as they are.
        schedule: fp32 ``[steps, 5]``, see :func:`schedule_row`.
        step: int64 scalar on the device, the row to use.
        adamw: betas, eps and weight decay.
        bits: bits per code, 1 to 8.
        group_size: input features a group; -1 for the whole row.
        scale_dtype: dtype in which scales are stored.
        zero_range: lowest and highest zero-point; None for all. Beyond it gradients pass straight through.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Raises:
        InputError: a shape, a dtype or a memory layout is wrong, or ``impl`` cannot run.
    """
    columns = weight.shape[1]
    width = columns if group_size == -1 else group_size
    groups = (weight.shape[0], columns // width)
    expected = {"weight": (weight, weight.shape), "scales": (scales, groups), "zeros": (zeros, groups)}
    for (name, (_, shape)), both in zip(tuple(expected.items()), moments, strict=True):
        if both is not None:
            expected |= {f"{name}' {which} moments": (getattr(both, which), shape) for which in ("first", "second")}
    for name, (tensor, shape) in expected.items():
        if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous() or columns % width:
            raise InputError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}; expected contiguous torch.float32 {list(shape)}"
            )
    if not (gradient.shape == dequantized.shape == weight.shape and dequantized.is_contiguous()):
        raise InputError(
            f"gradient is {list(gradient.shape)} and dequantized {list(dequantized.shape)}; "
            f"expected contiguous {list(weight.shape)}"
        )
    run(
        "fake_quant_adamw",
        impl,
        weight.device,
        weight,
        scales,
        zeros,
        gradient,
        dequantized,
        moments,
        schedule,
        step,
        adamw,
        bits,
        width,
        scale_dtype,
        (0, 2**bits - 1) if zero_range is None else zero_range,
    )
