"""What could not be held exactly, measured while it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eqat_export.tensors import dtype_name
from formats.errors import CheckpointError

__all__ = ["Rounding"]

_SMALLEST = 2.0**-149  # fp32's smallest positive number


@dataclass
class Rounding:
    """What rounding did to the weights of the layers, or values of the tensors, that could not be held exactly.

    Attributes:
        tensors: how many were rounded.
        error: largest absolute difference.
        relative: largest ``|difference| / |value|`` over non-zero values.
        bound: the format's bound where ``error`` was found.
        where: name of the layer or tensor it was found in.
    """

    tensors: int = 0
    error: float = 0.0
    relative: float = 0.0
    bound: float = 0.0
    where: str = ""

    def add(self, name: str, exact: Tensor, stored: Tensor, bound: Callable[[int], Tensor]) -> None:
        """Takes the differences of a tensor of at least one axis, or of some rows of it, into account.

        Args:
            name: the tensor, or its layer.
            exact: fp32 values.
            stored: what stands in their place.
            bound: of one row's differences, broadcastable to the row.

        Raises:
            CheckpointError: the largest difference is beyond its bound, or a stored value is not finite.
        """
        difference = (stored.float() - exact).abs_()
        worst = int(difference.argmax())  # NaN counts as the largest
        row, column = divmod(worst, difference[0].numel())
        error = float(difference.flatten()[worst])
        limit = float(bound(row).broadcast_to(difference[row : row + 1].shape).flatten()[column])
        if not error <= limit:  # false for NaN
            value = float(exact.flatten()[worst])
            raise CheckpointError(
                f"{name}: the value {value:.6g} cannot be stored as {dtype_name(stored.dtype)}; try another --dtype"
            )
        if error >= self.error:
            self.error, self.bound, self.where = error, limit, name
        share = difference.div_(exact.abs().clamp_(min=_SMALLEST))  # a zero stays one
        self.relative = max(self.relative, float(share.max()))

    def add_cast(self, name: str, tensor: Tensor, cast: Tensor) -> None:
        """Takes one tensor's cast to another dtype into account, unless it is exact.

        Raises:
            CheckpointError: a value is beyond the dtype's range.
        """
        if torch.equal(cast.to(tensor.dtype), tensor):
            return
        limits = torch.finfo(cast.dtype)
        exact = tensor.float().flatten()

        def bound(row: int) -> Tensor:
            # half a unit in the last place, and half the smallest subnormal number
            return exact[row].abs() * (limits.eps / 2) + limits.smallest_normal * limits.eps / 2

        self.add(name, exact, cast.flatten(), bound)
        self.tensors += 1

    def add_groups(self, name: str, error: Tensor, scales: Tensor) -> None:
        """Takes groups into account whose weights are all off by the same.

        Args:
            name: their layer.
            error: ``[out, groups]``.
            scales: ``[out, groups]``; no weight but zero is smaller.
        """
        worst = float(error.max())
        if worst > self.error:
            self.error, self.bound, self.where = worst, worst, name
        share = (error / scales.to(error.dtype).abs()).nan_to_num_(0.0, posinf=0.0)
        self.relative = max(self.relative, float(share.max()))

    def merge(self, other: Rounding) -> None:
        """Takes what was found elsewhere into account."""
        self.tensors += other.tensors
        self.relative = max(self.relative, other.relative)
        if other.where and other.error >= self.error:
            self.error, self.bound, self.where = other.error, other.bound, other.where
