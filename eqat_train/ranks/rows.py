"""Matrices whose rows are shared out over the ranks.

Each rank holds equally many consecutive rows of a matrix, the last ones fewer where the number of ranks does not divide
them, so that a gathered matrix is the ranks' parts one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .group import rank, size

__all__ = ["Coming", "Rows", "own_rows"]

# torch 2.13 gave them these names and warns of the old ones
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Coming:
    """A tensor that is on its way: what follows on the device may run beside it until ``wait``."""

    def __init__(self, tensor: Tensor, work: dist.Work, source: Tensor) -> None:
        self._tensor, self._work = tensor, work
        self._source: Tensor | None = source  # not freed before it is read

    def wait(self) -> Tensor:
        """The tensor; on a GPU the current stream waits for it, the host does not."""
        self._work.wait()
        self._source = None
        return self._tensor


@dataclass(frozen=True)
class Rows:
    """One rank's part of a matrix's rows.

    Attributes:
        count: rows of the whole matrix.
        rank: whose part.
        ranks: that share them.
    """

    count: int
    rank: int
    ranks: int

    @property
    def most(self) -> int:
        """Rows of the largest part."""
        return -(-self.count // self.ranks)

    @property
    def own(self) -> slice:
        """The part; may be empty."""
        first = min(self.count, self.rank * self.most)
        return slice(first, min(self.count, first + self.most))

    def gather(self, own: Tensor) -> Coming:
        """Begins to gather the whole from every rank's part; every rank calls it.

        Args:
            own: ``[own rows, ...]``, any dtype.
        """
        padded = _padded(own.detach(), self.most)
        whole = padded.new_empty(self.most * self.ranks, *own.shape[1:])
        return Coming(whole[: self.count], _gather(whole, padded, async_op=True), padded)

    def sum(self, whole: Tensor) -> Coming:
        """Begins to add up the ranks' matrices, of which each rank gets its part; every rank calls it.

        Args:
            whole: ``[rows, ...]``, a matrix of the whole's size on every rank.
        """
        padded = _padded(whole, self.most * self.ranks)
        own = padded.new_empty(self.most, *whole.shape[1:])
        part = self.own
        return Coming(own[: part.stop - part.start], _scatter(own, padded, async_op=True), padded)


def own_rows(count: int) -> Rows:
    """This rank's part of ``count`` rows; all of them in a process that acts alone."""
    return Rows(count, rank(), size())


def _padded(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - len(tensor)
    if not missing:
        return tensor.contiguous()
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing))
