"""The learning rate over the steps of end-to-end training."""

from __future__ import annotations

import math

__all__ = ["learning_rate_factor"]


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step (from 0): linear up to 1, then cosine towards 0 at ``steps``.

    The first step already moves: of ``n`` warm-up steps, step ``i`` takes ``(i + 1) / n``.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
