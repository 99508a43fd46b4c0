"""The gated activation in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["swiglu"]


def swiglu(gate_up: Tensor) -> Tensor:
    """See :func:`eqat_train.ops.swiglu.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
