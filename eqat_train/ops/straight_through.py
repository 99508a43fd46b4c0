"""Rounding that gradients do not see."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["round_to_dtype"]


def round_to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values as ``dtype`` would store them, in their own dtype; the gradient passes as if nothing was rounded."""
    return cast(Tensor, _RoundToDtype.apply(values, dtype))


class _RoundToDtype(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
