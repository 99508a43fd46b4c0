"""What could not be held exactly, measured while it is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eqat_export.tensors import dtype_name
from formats.errors import CheckpointError

__all__ = ["Rounding"]


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

    def add(self, name: str, exact: Tensor, stored: Tensor, bound: Tensor) -> None:
        """Takes the differences of one tensor, or of some rows of it, into account.

        Raises:
            CheckpointError: a stored value is further off than its bound, or not finite.
        """
        difference = (stored.float() - exact).abs_()
        within = difference <= bound  # false for NaN
        if not bool(within.all()):
            value = float(exact[~within].flatten()[0])
            raise CheckpointError(
                f"{name}: the value {value:.6g} cannot be stored as {dtype_name(stored.dtype)}; try another --dtype"
            )
        share = (difference / exact).abs_().nan_to_num_(0.0, posinf=0.0)  # over non-zero values
        self.relative = max(self.relative, float(share.max()))
        worst = int(difference.argmax())
        if float(difference.flatten()[worst]) >= self.error:
            self.error = float(difference.flatten()[worst])
            self.bound = float(bound.expand_as(difference).flatten()[worst])
            self.where = name

    def add_cast(self, name: str, tensor: Tensor, cast: Tensor) -> None:
        """Takes one tensor's cast to another dtype into account, unless it is exact.

        Raises:
            CheckpointError: a value is beyond the dtype's range.
        """
        if torch.equal(cast.to(tensor.dtype), tensor):
            return
        limits = torch.finfo(cast.dtype)
        exact = tensor.float()
        # half a unit in the last place, and half the smallest subnormal number
        self.add(name, exact, cast, exact.abs() * (limits.eps / 2) + limits.smallest_normal * limits.eps / 2)
        self.tensors += 1

    def add_groups(self, name: str, error: Tensor, scales: Tensor) -> None:
        """Takes groups into account whose weights are all off by the same.

        Args:
            name: their layer.
            error: float64 ``[out, groups]``.
            scales: ``[out, groups]``; no weight but zero is smaller.
        """
        worst = float(error.max())
        if worst > self.error:
            self.error, self.bound, self.where = worst, worst, name
        share = (error / scales.double().abs()).nan_to_num_(0.0, posinf=0.0)
        self.relative = max(self.relative, float(share.max()))

    def merge(self, other: Rounding) -> None:
        """Takes what was found elsewhere into account."""
        self.tensors += other.tensors
        self.relative = max(self.relative, other.relative)
        if other.where and other.error >= self.error:
            self.error, self.bound, self.where = other.error, other.bound, other.where
