"""The loss of E2E-QAT, a piece of the tokens at a time: the teacher's logits are never stored, nor the student's whole.

Both models have the same frozen output head, so a piece's logits and the gradient of the student's hidden states come
from two products with it. Where logits are more than a linear head of the hidden states, or the head is quantized
itself, the logits of the pass exist whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import NO_LOSS
from ..e2e_qp.head import Head, tokens_a_piece
from ..ops.distillation import distillation_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["distillation_loss"]


def distillation_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    head: Head | None,
    ids: Tensor,
    labels: Tensor,
    share: float,
    scale: float,
) -> Tensor:
    """``scale`` times the sum of the target tokens' losses.

    Args:
        student: in training.
        teacher: the full-precision model in the compute dtype, without gradients.
        head: of both models, in the teacher's dtype; None computes each model's own logits.
        ids: int64 ``[windows, seq_len]``.
        labels: the same, -100 where there is no loss; not shifted.
        share: of the divergence from the teacher, see :mod:`eqat_train.ops.distillation`.
        scale: one over the number of target tokens of the optimizer step.

    Returns:
        A scalar, float32 or float64.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=NO_LOSS).flatten()  # the last position predicts nothing
    if head is None:
        logits = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        return cast(Tensor, _LogitsLoss.apply(logits, wanted.to(logits.dtype), targets, share, scale))
    hidden = student.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    with torch.no_grad():
        wanted = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    return cast(Tensor, _HeadLoss.apply(hidden, wanted, head, targets, share, scale))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor, head: Head, targets: Tensor, share: float, scale: float
    ) -> Tensor:
        weight, bias = head.linear.weight, head.linear.bias
        grad = torch.empty_like(hidden)
        losses = []
        step = tokens_a_piece(teacher, weight)
        for start in range(0, hidden.shape[0], step):
            piece = slice(start, start + step)
            logits = F.linear(hidden[piece].to(weight.dtype), weight, bias)  # [piece, vocabulary]
            wanted = F.linear(teacher[piece], weight, bias)
            losses.append(distillation_(logits, wanted, targets[piece], share=share, scale=scale, softcap=head.softcap))
            grad[piece] = (logits @ weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None, None


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, targets: Tensor, share: float, scale: float) -> Tensor:
        grad = logits.clone(memory_format=torch.contiguous_format)
        losses = distillation_(grad, wanted.contiguous(), targets, share=share, scale=scale)
        ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None
