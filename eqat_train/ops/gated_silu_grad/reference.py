"""The gradients in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["gated_silu_grad"]


def gated_silu_grad(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`eqat_train.ops.gated_silu_grad.gated_silu_grad_`."""
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    with torch.enable_grad():
        y = F.silu(leaves[0]) * leaves[1]
    grad_gate, grad_up = torch.autograd.grad(y, leaves, grad)
    return grad_gate, grad.copy_(grad_up)
