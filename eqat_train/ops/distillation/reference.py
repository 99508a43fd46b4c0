"""Distillation loss and its gradient in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["distillation"]


def distillation(
    logits: Tensor, teacher: Tensor, targets: Tensor, share: float, scale: float, softcap: float | None
) -> Tensor:
    """See :func:`eqat_train.ops.distillation.distillation_`."""
    values, wanted = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (logits, teacher))
    if softcap is not None:
        values, wanted = (softcap * torch.tanh(part / softcap) for part in (values, wanted))
    log_p, log_q = values.log_softmax(dim=1), wanted.log_softmax(dim=1)
    kept = (targets >= 0).unsqueeze(1)
    index = targets.clamp_min(0).unsqueeze(1)
    q = log_q.exp()
    losses = share * (q * (log_q - log_p)).sum(dim=1, keepdim=True) - (1 - share) * log_p.gather(1, index)
    grad = log_p.exp().sub_(q, alpha=share)
    grad.scatter_add_(1, index, grad.new_full((), share - 1.0).expand(index.shape))
    if softcap is not None:
        grad *= 1 - (values / softcap).square_()
    logits.copy_(torch.where(kept, grad.mul_(scale), 0.0))
    return torch.where(kept, losses * scale, 0.0).squeeze(1)
