"""Scales and zero-points that training starts from."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from formats import QuantScheme
from formats.affine import minmax_parameters

__all__ = ["STARTS", "Start", "start_parameters"]

Start = Literal["minmax", "mse", "activations"]
STARTS: tuple[Start, ...] = ("minmax", "mse", "activations")
# Shares of the min-max scale that are tried: the best of a Gaussian group is at 0.55 for 2 bits and at 0.95 for 4.
SHARES = tuple(0.30 + 0.05 * step for step in range(15))
REFINEMENTS = 2
# Weights looked at together, so that a large layer needs little memory beside itself.
PIECE = 2**24


@torch.no_grad()
def start_parameters(
    weight: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    zero_range: tuple[int, int] | None = None,
    start: Start = "minmax",
    input_power: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and zero-points of a weight before training.

    ``mse`` searches, group by group, for the least squared error of the rounded weight: shares of the min-max scale
    with the zero-points next to the one that keeps the group's minimum, and then alternately the nearest codes of a
    scale and the best scale of those codes, ``s = <w, q - z> / <q - z, q - z>``. ``activations`` does the same with
    every column's squared error weighted by the mean square of its input: the error of the layer's output, were its
    inputs uncorrelated.

    Args:
        weight: fp32 ``[out, in]``.
        scheme: bits and group_size, a divisor of ``in``.
        scale_dtype: what scales will be stored in.
        zero_range: lowest and highest zero-point allowed.
        start: which of the three.
        input_power: mean square of each input ``[in]``, any scale; for ``activations``.

    Returns:
        fp32 scales ``[out, groups]`` and fp32 zeros ``[out, groups]``, whole numbers.
    """
    scales, zeros = minmax_parameters(weight, scheme, scale_dtype, zero_range)
    zeros = zeros.float()
    if start == "minmax":
        return scales, zeros
    if start == "mse":
        input_power = torch.ones_like(weight[0])
    elif input_power is None:
        raise ValueError("the start 'activations' needs the power of the inputs")
    importance = input_power.float().unflatten(0, (scales.shape[1], -1))  # [groups, width]
    # a group whose inputs are all zero counts like any other: its error would be nothing whatever its scale
    importance = torch.where(importance.sum(dim=1, keepdim=True) > 0, importance, torch.ones_like(importance))
    low, high = zero_range or (0, scheme.maxq)
    rows = max(1, PIECE // weight.shape[1])
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        groups = weight[part].unflatten(1, (scales.shape[1], -1))  # [rows, groups, width]
        scales[part], zeros[part] = _least_squares(
            groups, importance, scales[part], zeros[part], scheme.maxq, (low, high)
        )
    limits = torch.finfo(scale_dtype)
    return scales.clamp(limits.tiny, limits.max), zeros


def _least_squares(
    groups: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, maxq: int, zero_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    low, high = groups.aminmax(dim=2)
    best = torch.full_like(scales, torch.inf)
    found, found_zeros = scales.clone(), zeros.clone()

    def keep(tried: Tensor, tried_zeros: Tensor) -> None:
        codes = _codes(groups, tried, tried_zeros, maxq)
        error = torch.addcmul(groups, codes, tried.unsqueeze(2), value=-1).square_().mul_(importance).sum(dim=2)
        better = error < best
        best.copy_(torch.where(better, error, best))
        found.copy_(torch.where(better, tried, found))
        found_zeros.copy_(torch.where(better, tried_zeros, found_zeros))

    for share in SHARES:
        tried = scales * share
        middle = (-(low + high) / (2 * tried) + maxq / 2).round()
        for offset in (-1, 0, 1):
            keep(tried, (middle + offset).clamp(*zero_range))
    for _ in range(REFINEMENTS):
        codes = _codes(groups, found, found_zeros, maxq)
        power = codes.square().mul_(importance).sum(dim=2)
        fitted = (groups * codes).mul_(importance).sum(dim=2) / power.clamp_min(torch.finfo(torch.float32).tiny)
        # a group whose codes are all at the zero-point, or whose fit is negative, keeps its scale
        keep(torch.where((power > 0) & (fitted > 0), fitted, found), found_zeros)
    return found, found_zeros


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor, maxq: int) -> Tensor:
    """Nearest codes less the zero-point, ``[rows, groups, width]``."""
    z = zeros.unsqueeze(2)
    return (groups / scales.unsqueeze(2)).round_().add_(z).clamp_(0, maxq).sub_(z)
