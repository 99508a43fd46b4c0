"""GPTQ's error compensation (arXiv 2210.17323) on a grid that is given, a lead of ``leads.py``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compensated"]


@torch.no_grad()
def compensated(
    weight: Tensor, scales: Tensor, zeros: Tensor, maxq: int, hessian: Tensor, damping: float = 0.01
) -> Tensor:
    """The weight with each column moved by the rounding errors of those before it; rounded, it has GPTQ's codes.

    Args:
        weight: fp32 ``[out, in]``.
        scales: fp32 ``[out, groups]``.
        zeros: fp32 ``[out, groups]``, whole numbers.
        maxq: the highest code.
        hessian: ``X^T X`` of the layer's inputs, fp32 ``[in, in]``, any scale.
        damping: share of the diagonal's mean that is added to it.
    """
    width = weight.shape[1]
    hessian = hessian.double()
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    hessian = hessian + damping * mean * torch.eye(width, dtype=hessian.dtype, device=hessian.device)
    # upper factor of the inverse: row j holds how an error in column j is shared by those after it
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    moved, group = weight.clone(), width // scales.shape[1]
    for column in range(width):
        s, z = scales[:, column // group], zeros[:, column // group]
        w = moved[:, column]
        rounded = (((w / s).round() + z).clamp(0, maxq) - z) * s
        error = (w - rounded) / factor[column, column]
        moved[:, column + 1 :].addr_(error, factor[column, column + 1 :], alpha=-1)
    return moved
