"""Parameters that every rank updates by itself must stay the same to the bit; a rank that drifts is noticed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from formats.errors import EqatError

from .group import current

__all__ = ["RanksDifferError", "check_same"]

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RanksDifferError(EqatError):
    """The ranks' parameters are no longer the same."""


def check_same(tensors: Mapping[str, Tensor], where: str) -> None:
    """Compares tensors over the ranks by the sums of their bit patterns; on a GPU as fast as they are read.

    Args:
        tensors: by name, the same names and shapes on every rank.
        where: for the message, e.g. ``block 3``.

    Raises:
        RanksDifferError: a tensor differs; the text names the first. It is raised on every rank.
    """
    ranks = current()
    if ranks is None or not tensors:
        return
    sums = torch.stack([_sum(tensor) for tensor in tensors.values()]).to(ranks.device)
    bounds = torch.stack([sums, -sums])
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    differing = (bounds[0] != -bounds[1]).tolist()
    for name, differs in zip(tensors, differing, strict=True):
        if differs:
            raise RanksDifferError(
                f"{where}: {name} is not the same on all {ranks.size} ranks, and should be to the bit (checksum); "
                "a GPU or its memory may be faulty, or ranks run different versions of torch: what is finished is "
                "kept, so the same command goes on before this point"
            )


def _sum(tensor: Tensor) -> Tensor:
    """An int64 that any change of a bit changes."""
    words = tensor.detach().contiguous().view(WORDS[tensor.element_size()])
    return words.sum(dtype=torch.int64)
