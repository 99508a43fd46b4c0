"""Distillation loss of rows of logits and its gradient, in place of the logits."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import run

__all__ = ["distillation_"]


def distillation_(
    logits: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    share: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """``share * KL(teacher || student) + (1 - share) * cross-entropy`` of rows; the logits become the gradient.

    With ``p`` and ``q`` the softmax of ``logits`` and of ``teacher`` the gradient of a row is
    ``p - share * q - (1 - share) * onehot(target)``.

    Args:
        logits: floating ``[rows, vocabulary]``, contiguous; overwritten by ``scale * d(sum of losses) / d(logits)``,
            rounded once to its dtype.
        teacher: the teacher's logits, of the same shape and dtype, contiguous; only read.
        targets: int64 ``[rows]``; a row whose target is negative has neither loss nor gradient.
        share: of the divergence, 0 to 1.
        scale: of the gradient and of the losses.
        softcap: both models' logits are ``softcap * tanh(logits / softcap)``.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        ``[rows]``, float32, or float64 when ``logits`` is.
    """
    losses: Tensor = run("distillation", impl, logits.device, logits, teacher, targets, share, scale, softcap)
    return losses
