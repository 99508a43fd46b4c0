"""Linear layers of which each rank holds some rows: the whole weight exists while it is multiplied with.

Rows are rounded to the compute dtype, and in training quantized, by the rank that holds them, so what travels are the
16-bit numbers that are multiplied with. Backward gathers them again instead of keeping them. There the weight's
gradient needs no weight and the input's gradient no other rank's, so both journeys run beside a product:

    weight's rows    gather ------.
    weight's gradient      g'x    |    sum over the ranks ---.
    input's gradient              '--- g W                   |
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ranks.rows import Rows

__all__ = ["RowLinear", "compute_dtype", "linear_of_rows"]


def linear_of_rows(x: Tensor, own: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """``x W' + bias`` with a weight of which each rank holds some rows; every rank calls it, and its backward.

    Args:
        x: ``[..., in]``; ranks' inputs differ.
        own: this rank's rows of the weight, ``[own rows, in]``, in the dtype of the product. Its gradient is the sum of
            the ranks'.
        bias: ``[out]``, the same on every rank; its gradient is this rank's alone.
        rows: which rows they are.

    Returns:
        ``[..., out]``.
    """
    bias = None if bias is None else bias.to(own.dtype)
    return cast(Tensor, _LinearOfRows.apply(x.to(own.dtype), own, bias, rows))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a product with ``x`` is computed in now: autocast's dtype, or float32."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


class RowLinear(nn.Linear):
    """A frozen linear layer, this rank's rows of it.

    Attributes:
        weight: ``[own rows, in]``.
        bias: ``[out]`` or None.
        rows: which rows they are.

    Args:
        linear: the layer, whose weight may be on the meta device.
        weight: this rank's rows.
        rows: which rows they are.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, rows: Rows) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rows = linear.in_features, linear.out_features, rows
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        return linear_of_rows(x, self.weight.to(dtype), self.bias, self.rows)


class _LinearOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
        ctx.save_for_backward(x, own)
        ctx.rows = rows
        return F.linear(x, rows.gather(own).wait(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, own = ctx.saved_tensors
        for_x, for_own, for_bias, _ = ctx.needs_input_grad
        grad = grads[0].flatten(0, -2)  # [tokens, out]
        coming = ctx.rows.gather(own) if for_x else None
        summed = ctx.rows.sum(grad.t() @ x.flatten(0, -2)) if for_own else None
        grad_x = None if coming is None else (grad @ coming.wait()).view_as(x)
        return (
            grad_x,
            None if summed is None else summed.wait(),
            grad.sum(0) if for_bias else None,
            None,
        )
