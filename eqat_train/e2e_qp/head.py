"""The loss of a frozen output head, a piece of the tokens at a time.

Logits and their gradient exist for one piece only. The head is not trained, so the gradient that backward needs, the
hidden states', is computed where the loss is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.cross_entropy import cross_entropy_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Head", "find_head", "head_loss", "tokens_a_piece"]

# Bytes of one piece's logits.
PIECE = {"cpu": 2**25, "cuda": 2**27}


@dataclass(frozen=True, eq=False)
class Head:
    """``logits = softcap * tanh(linear(hidden) / softcap)``, or ``linear(hidden)``.

    Attributes:
        linear: frozen, in full precision.
        softcap: None for plain logits.
    """

    linear: nn.Linear
    softcap: float | None


_heads: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def find_head(model: PreTrainedModel, ids: Tensor) -> Head | None:
    """The head of a model, or None if its logits are more than a head of its hidden states.

    A few of the tokens ``ids`` are run through the model once to make sure, with gradients, so that the linears take
    training's path; the answer is kept with the model.
    """
    if model not in _heads:
        _heads[model] = _probed_head(model, ids[:1, :8])
    return _heads[model]


@torch.enable_grad()
def _probed_head(model: PreTrainedModel, ids: Tensor) -> Head | None:
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear) or any(parameter.requires_grad for parameter in linear.parameters()):
        return None
    head = Head(linear, getattr(model.config.get_text_config(), "final_logit_softcapping", None))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = linear(hidden)
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return head if torch.equal(logits, model(input_ids=ids, use_cache=False).logits) else None


def head_loss(head: Head, hidden: Tensor, targets: Tensor, scale: float, *, impl: str = "auto") -> Tensor:
    """``scale`` times the sum of the tokens' losses.

    Args:
        head: of the model.
        hidden: ``[tokens, hidden_size]`` in the dtype of the head.
        targets: int64 ``[tokens]``, negative where a token has no loss.
        scale: one over the number of target tokens of the optimizer step, so that gradients are rounded once.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        A scalar, float32 or float64; differentiable in ``hidden``.
    """
    return cast(Tensor, _HeadLoss.apply(hidden, head, targets, scale, impl))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, scale: float, impl: str) -> Tensor:
        weight, bias = head.linear.weight, head.linear.bias
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = []
        for start in range(0, hidden.shape[0], tokens_a_piece(hidden, weight)):
            piece = slice(start, start + tokens_a_piece(hidden, weight))
            logits = F.linear(hidden[piece], weight, bias)  # [piece, vocabulary]
            losses.append(cross_entropy_(logits, targets[piece], scale=scale, softcap=head.softcap, impl=impl))
            if grad is not None:
                torch.mm(logits, weight, out=grad[piece])
        if grad is not None:
            ctx.save_for_backward(grad)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # the loss is the last thing computed: its own gradient is 1 unless a caller scales it
        return grad * grads[0].to(grad.dtype), None, None, None, None


def tokens_a_piece(hidden: Tensor, weight: Tensor) -> int:
    """Tokens whose logits are computed together: a multiple of 256 if that fits."""
    fits = PIECE["cuda" if hidden.device.type == "cuda" else "cpu"] // (weight.shape[0] * hidden.element_size())
    return max(1, fits - fits % 256 if fits > 256 else fits)
