"""Cross-entropy and its gradient in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cross_entropy"]


def cross_entropy(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    """See :func:`eqat_train.ops.cross_entropy.cross_entropy_`."""
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        values = softcap * torch.tanh(values / softcap)
    kept = (targets >= 0).unsqueeze(1)
    index = targets.clamp_min(0).unsqueeze(1)
    normalizer = values.logsumexp(dim=1, keepdim=True)
    # a row without a target has neither loss nor gradient, not even of a logit that is not finite
    losses = torch.where(kept, (normalizer - values.gather(1, index)) * scale, 0.0)
    grad = (values - normalizer).exp_()
    grad.scatter_add_(1, index, grad.new_full((), -1.0).expand(index.shape))
    if softcap is not None:
        grad *= 1 - (values / softcap).square_()
    logits.copy_(torch.where(kept, grad.mul_(scale), 0.0))
    return losses.squeeze(1)
