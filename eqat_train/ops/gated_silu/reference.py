"""The activation in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["gated_silu"]


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`eqat_train.ops.gated_silu.gated_silu`."""
    return F.silu(gate) * up
