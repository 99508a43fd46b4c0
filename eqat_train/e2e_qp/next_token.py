"""Next-token cross-entropy of a model in memory: its gradient in micro-batches, and its mean.

Labels are not shifted and -100 marks tokens without loss (see :mod:`eqat_train.data`). Every mean is over target
tokens, so it does not depend on how windows are cut into batches. Nothing here waits for the device; transformers'
mask code does, once a forward pass, to look for packed sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import NO_LOSS, TokenWindows
from .head import find_head, head_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["accumulate_gradients", "mean_loss"]


def accumulate_gradients(
    model: PreTrainedModel,
    windows: TokenWindows,
    micro_batch_size: int,
    device: torch.device,
    *,
    targets: int | None = None,
) -> Tensor:
    """Adds the gradient of the windows' mean loss to the parameters' ``grad``.

    Args:
        model: a causal language model.
        windows: one optimizer step's batch, on the CPU.
        micro_batch_size: windows a forward and backward pass.
        device: where the model is.
        targets: target tokens that the loss is a mean over, where these windows are a part of the batch.

    Returns:
        The mean loss over the batch's target tokens: a scalar on ``device``.
    """
    targets = windows.loss_tokens if targets is None else targets
    total = torch.zeros((), device=device)
    for ids, labels in _on_device(windows, micro_batch_size, device):
        loss = _summed_loss(model, ids, labels, 1 / targets)
        loss.backward()
        total = total + loss.detach()
    return total


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    windows: TokenWindows,
    micro_batch_size: int,
    device: torch.device,
    *,
    targets: int | None = None,
) -> Tensor:
    """Mean loss over all target tokens of the windows, or their part of it: a float64 scalar on ``device``."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for ids, labels in _on_device(windows, micro_batch_size, device):
        total += _summed_loss(model, ids, labels, 1.0)
    return total / (windows.loss_tokens if targets is None else targets)


def _on_device(windows: TokenWindows, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in windows.batches(batch_size):
        ids, labels = batch.input_ids, batch.labels
        if device.type == "cuda":  # only pinned memory is copied without waiting
            ids, labels = ids.pin_memory(), labels.pin_memory()
        yield ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _summed_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor, scale: float) -> Tensor:
    """``scale`` times the sum of the target tokens' losses."""
    targets = F.pad(labels[:, 1:], (0, 1), value=NO_LOSS).flatten()  # the last position predicts nothing
    head = find_head(model, ids)
    if head is not None:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [windows, seq_len, hidden]
        return head_loss(head, hidden.flatten(0, 1), targets, scale)
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)  # [tokens, vocabulary]
    precision = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(precision), targets, ignore_index=NO_LOSS, reduction="sum") * scale
