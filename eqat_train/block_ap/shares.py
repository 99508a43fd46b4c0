"""Block-AP's samples shared out over ranks: of every batch each rank holds an equal part, so a step is the same step.

Samples keep their order. A rank's local batch of ``batch_size / ranks`` samples is its part of the global batch, and
the mean of the ranks' gradients is the gradient of the global batch's loss. What is kept on disk, finished blocks, does
not depend on the number of ranks, so another number may go on with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from formats.errors import InputError

from ..ranks.group import current, joined, largest, own_part, size, total
from ..ranks.orders import give_order
from ..resume.identity import tensor_fingerprint
from .activations import Place
from .settings import BlockApSettings

__all__ = ["call_followers", "own_samples", "own_settings", "slowest", "tokens_of_all"]

PLACES: tuple[Place, ...] = ("gpu", "ram", "disk")


def own_settings(settings: BlockApSettings) -> BlockApSettings:
    """The settings with this rank's part of the batch.

    Raises:
        InputError: the batch cannot be divided by the number of ranks.
    """
    ranks = joined()
    if ranks is None or not settings.epochs:
        return settings
    if settings.batch_size % ranks.size:
        fits = -(-settings.batch_size // ranks.size) * ranks.size
        raise InputError(
            f"--batch {settings.batch_size} windows a step cannot be shared evenly by {ranks.size} ranks; use --batch "
            f"{fits}, or a number of ranks that divides {settings.batch_size}"
        )
    return replace(settings, batch_size=settings.batch_size // ranks.size)


def own_samples(train: Tensor, val: Tensor, local_batch: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of the training and validation samples.

    Args:
        train: ``[samples, seq]``.
        val: ``[samples, seq]``; ranks' parts may differ by a sample.
        local_batch: samples of a step on one rank.

    Raises:
        InputError: the last batch cannot be shared evenly.
    """
    if size() == 1:
        return train, val
    batch = local_batch * size()
    if over := len(train) % batch % size():
        fewer, more = len(train) - over, len(train) - over + size()
        raise InputError(
            f"{len(train)} training samples in batches of {batch} leave a last batch of {len(train) % batch}, which "
            f"{size()} ranks cannot share evenly; use --samples {fewer or more} or {more}"
        )
    rows = torch.cat([part[own_part(len(part))] for part in torch.arange(len(train)).split(batch)])
    return train[rows], val[own_part(len(val))]


def call_followers(folder: Path, finished: int, train: Tensor, val: Tensor) -> None:
    """Rank 0 tells the others that training begins.

    Args:
        folder: of the finished blocks.
        finished: how many there are.
        train: all samples.
        val: all validation samples.
    """
    if joined() is not None:
        windows = tensor_fingerprint(train, val)
        give_order("block-ap", blocks=str(folder.absolute()), finished=finished, windows=windows)


def slowest(place: Place) -> Place:
    """The slowest of the places that ranks need for their activations, which all of them take."""
    return PLACES[largest(PLACES.index(place))]


def tokens_of_all(seen: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Tokens that each expert of each mixture saw on all ranks, from those it saw on this one."""
    ranks = current()
    if ranks is None:
        return dict(seen)
    counts = {path: torch.tensor(own, dtype=torch.int64, device=ranks.device) for path, own in seen.items()}
    return {path: tuple(total(own).tolist()) for path, own in counts.items()}
