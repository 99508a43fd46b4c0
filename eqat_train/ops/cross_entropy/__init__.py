"""Cross-entropy of rows of logits and its gradient, in place of the logits."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import run

__all__ = ["cross_entropy_"]


def cross_entropy_(
    logits: Tensor, targets: Tensor, *, scale: float = 1.0, softcap: float | None = None, impl: str = "auto"
) -> Tensor:
    """Losses of rows; the logits become the gradient of their sum.

    Args:
        logits: floating ``[rows, vocabulary]``, contiguous; overwritten by ``scale * d(sum of losses) / d(logits)``,
            rounded once to its dtype.
        targets: int64 ``[rows]``; a row whose target is negative has neither loss nor gradient.
        scale: of the gradient and of the losses.
        softcap: the model's logits are ``softcap * tanh(logits / softcap)``.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        ``[rows]``, float32, or float64 when ``logits`` is.
    """
    losses: Tensor = run("cross_entropy", impl, logits.device, logits, targets, scale, softcap)
    return losses
