"""The training loop of one decoder block: mean squared error against the full-precision block's output.

Batches come in the order of the samples, the same in every epoch, as in EfficientQAT's own code. On CUDA the loop does
not wait for the device: losses stay there and are looked at every ``CHECK_EVERY`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from formats.errors import TrainingDivergedError

from ..ranks.group import mean
from ..reporting.progress import Task
from .batches import batches
from .capture import BlockCall
from .passes import Streams, validate
from .steps import block_steps
from .trainable_block import TrainableBlock

if TYPE_CHECKING:
    from .settings import BlockApSettings

__all__ = ["train_block"]

CHECK_EVERY = 50  # steps between looks at the losses on CUDA


class _Losses:
    """Losses of one epoch, over all ranks, kept on the device and checked from time to time."""

    def __init__(self, steps: int, epoch: int, device: torch.device, settings: BlockApSettings, task: Task) -> None:
        self._values = torch.zeros(steps, device=device)
        self._steps, self._epoch, self._settings, self._task = steps, epoch, settings, task
        self._every = CHECK_EVERY if device.type == "cuda" else 1
        self._checked, self._sum = 0, 0.0

    def record(self, step: int, loss: Tensor) -> None:
        self._values[step] = loss
        if (step + 1) % self._every == 0 or step + 1 == self._steps:
            self._look(step + 1)

    def _look(self, done: int) -> None:
        recent = mean(self._values[self._checked : done]).tolist()
        for offset, value in enumerate(recent):
            if not math.isfinite(value):
                raise _diverged(value, f"epoch {self._epoch}, step {self._checked + offset}", self._settings)
        self._sum += sum(recent)
        self._checked = done
        self._task.update(len(recent), loss=recent[-1])

    def mean(self) -> float:
        return self._sum / self._steps


def _diverged(loss: float, where: str, settings: BlockApSettings) -> TrainingDivergedError:
    return TrainingDivergedError(
        f"loss became {loss} at {where} with learning rates weight {settings.lr_weight:g}, "
        f"scale {settings.lr_scale:g}, zero {settings.lr_zero:g}"
    )


def train_block(
    block: TrainableBlock,
    call: BlockCall,
    train: Streams,
    val: Streams,
    settings: BlockApSettings,
    task: Task,
    message: Callable[[str], None],
) -> tuple[list[float], list[float | None]]:
    """Trains a block in place.

    Args:
        block: the block, on the streams' device.
        call: its arguments besides the hidden states.
        train: quantized stream in, full-precision stream as the target.
        val: the same for the validation split; may be empty.
        settings: epochs, batch size and learning rates.
        task: is told every step.
        message: is told what cannot be done as asked and what is done instead.

    Returns:
        Mean training loss and validation loss of every epoch.

    Raises:
        TrainingDivergedError: a loss is NaN or infinite.
    """
    device, dtype = train.full.device, settings.resolved_compute_dtype()
    steps = math.ceil(len(train.full) / settings.batch_size)
    step_of = block_steps(block, call, settings, settings.epochs * steps, train.full.read(0, 1)[0], message)
    train_losses: list[float] = []
    val_losses: list[float | None] = []
    for epoch in range(settings.epochs):
        losses = _Losses(steps, epoch, device, settings, task)
        for step, (hidden_states, target) in enumerate(batches(train, settings.batch_size)):
            losses.record(step, step_of(hidden_states, target))
        train_losses.append(losses.mean())
        val_loss = validate(block, call, val, dtype)
        val_losses.append(val_loss)
        if val_loss is not None and not math.isfinite(val_loss):
            raise _diverged(val_loss, f"epoch {epoch}, validation", settings)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in step_of.trained()):
        raise _diverged(math.nan, "the end of the last epoch", settings)  # the last update is after the last loss
    step_of.close()
    return train_losses, val_losses
