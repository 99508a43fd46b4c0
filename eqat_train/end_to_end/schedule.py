"""What each step of end-to-end training has: its windows and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .settings import EndToEndSettings

__all__ = ["batches", "learning_rate_factor"]


def batches(windows: int, settings: EndToEndSettings) -> Iterator[Tensor]:
    """Of every step of a run, the numbers of its windows: int64 ``[batch_size]``, the last of an epoch may be shorter.

    Each epoch has an order of its own, which follows from the seed.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        yield from torch.randperm(windows, generator=generator).split(settings.batch_size)


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step (from 0): linear up to 1, then cosine towards 0 at ``steps``.

    The first step already moves: of ``n`` warm-up steps, step ``i`` takes ``(i + 1) / n``.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
