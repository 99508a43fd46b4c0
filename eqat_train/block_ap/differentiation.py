"""Loss and gradients of a block on a batch, by torch.compile if asked to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from formats.errors import InputError

from ..error_text import first_line
from .capture import BlockCall
from .passes import autocast, reconstruction_loss
from .trainable_block import TrainableBlock

if TYPE_CHECKING:
    from .settings import BlockApSettings

__all__ = ["Differentiation"]


class Differentiation:
    """Called with a batch, leaves gradients in the block's leaves and returns the loss.

    Args:
        block: what its forward uses and requires gradients is a leaf.
        call: its arguments besides the hidden states.
        settings: the compute dtype is used.
    """

    def __init__(self, block: TrainableBlock, call: BlockCall, settings: BlockApSettings) -> None:
        self._block, self._call = block, call
        self._dtype = settings.resolved_compute_dtype()
        self._compiled: Callable[..., Tensor] | None = None
        self._compiled_for: torch.Size | None = None
        self._message: Callable[[str], None] | None = None

    def compile(self, message: Callable[[str], None] | None) -> None:
        """From now on batches of the first one's shape are compiled; blocks of one architecture share what is made.

        Args:
            message: is told when that fails and batches are computed as they were; None to raise InputError instead.
        """
        self._compiled, self._message = torch.compile(_loss, dynamic=False), message

    def __call__(self, hidden_states: Tensor, target: Tensor) -> Tensor:
        self._compiled_for = self._compiled_for or hidden_states.shape
        if self._compiled is not None and hidden_states.shape == self._compiled_for:
            try:
                return self._backward(self._compiled, hidden_states, target)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._not_compiled(error)
        return self._backward(_loss, hidden_states, target)

    def _backward(self, loss_of: Callable[..., Tensor], hidden_states: Tensor, target: Tensor) -> Tensor:
        with autocast(hidden_states.device, self._dtype):
            loss = loss_of(self._block, self._call, hidden_states, target)
        loss.backward()
        return loss.detach()

    def _not_compiled(self, error: Exception) -> None:
        text = f"the block's step cannot be compiled ({first_line(error)})"
        if self._message is None:
            raise InputError(f"{text}; use execution auto, graph or eager") from error
        self._message(f"{text}; it runs as it is, slower")
        self._compiled = None
        for leaf in self._block.leaves():
            leaf.grad = None


def _loss(block: TrainableBlock, call: BlockCall, hidden_states: Tensor, target: Tensor) -> Tensor:
    return reconstruction_loss(block(call, hidden_states), target)
