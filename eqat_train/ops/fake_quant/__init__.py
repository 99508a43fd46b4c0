"""Fake quantization of a weight with learned scales and zero-points (Block-AP, arXiv 2407.11062, section 3.2).

``w_hat = (clamp(round(w / s) + z, 0, maxq) - z) * s`` with ``s`` and ``z`` as they will be stored, so the result is
exactly what ``formats.affine.dequantize`` gives for the codes that ``formats.affine.quantize`` packs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formats.errors import InputError

from ..dispatch import run
from .reference import stored_scales, stored_zeros

__all__ = ["fake_quant", "stored_scales", "stored_zeros"]


def fake_quant(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype = torch.float16,
    dtype: torch.dtype = torch.float32,
    *,
    impl: str = "auto",
) -> Tensor:
    """Dequantized weight of a linear layer under training, with gradients for weight, scales and zeros.

    Rounding, and the clamps of scales and zeros, are straight-through; the clamp of the codes is not: a weight whose
    code is clipped gets no gradient, and its zero-point and scale get the gradient of the end it is clipped to.

    Args:
        weight: fp32 ``[out, in]``.
        scales: fp32 ``[out, groups]``; kept at normal numbers of ``scale_dtype`` and rounded to it.
        zeros: fp32 ``[out, groups]``; rounded to integers 0..maxq.
        bits: bits per code, 1 to 8.
        group_size: input features a group, a divisor of ``in``; -1 for the whole row.
        scale_dtype: dtype in which scales are stored.
        dtype: of the result, which is rounded to it once; gradients come back in it.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        ``[out, in]`` in ``dtype``.

    Raises:
        InputError: the group size does not divide the row, a shape or dtype is wrong, or ``impl`` cannot run.
    """
    rows, columns = weight.shape
    width = columns if group_size == -1 else group_size
    if columns % width:
        raise InputError(f"group_size {group_size} does not divide in_features {columns}; use a divisor, or -1")
    for name, tensor, shape in (
        ("weight", weight, (rows, columns)),
        ("scales", scales, (rows, columns // width)),
        ("zeros", zeros, (rows, columns // width)),
    ):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise InputError(f"{name} are {tensor.dtype} {list(tensor.shape)}; expected torch.float32 {list(shape)}")
    return run("fake_quant", impl, weight.device, weight, scales, zeros, bits, width, scale_dtype, dtype)
