"""The training loop of one decoder block: mean squared error against the full-precision block's output.

Batches come in the order of the samples, the same in every epoch, as in EfficientQAT's own code. On CUDA the loop does
not wait for the device: losses stay there and are looked at every ``CHECK_EVERY`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from formats.errors import TrainingDivergedError

from ..reporting.progress import Task
from .activations import ActivationStore
from .capture import BlockCall
from .trainable_block import TrainableBlock

if TYPE_CHECKING:
    from .settings import BlockApSettings

__all__ = ["Streams", "advance_", "cosine", "forward_spans", "train_block", "validate"]

CHECK_EVERY = 50  # steps between looks at the losses on CUDA
FORWARD_TOKENS = 8192  # tokens a batch where nothing is trained


@dataclass(frozen=True)
class Streams:
    """Hidden states of one data split: through the full-precision blocks, and through the finished ones."""

    full: ActivationStore
    quantized: ActivationStore


def cosine(step: int, total: int, lr: float, min_lr_factor: float) -> float:
    """Learning rate of a step, 0..total: from ``lr`` down to ``lr / min_lr_factor``."""
    lowest = lr / min_lr_factor
    return lowest + (lr - lowest) * (1 + math.cos(math.pi * step / total)) / 2


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def forward_spans(store: ActivationStore) -> Iterator[tuple[int, int]]:
    """Sample ranges to go through a stream with when nothing is trained."""
    batch = max(1, FORWARD_TOKENS // store.shape[1])
    for start in range(0, len(store), batch):
        yield start, min(start + batch, len(store))


@torch.no_grad()
def advance_(store: ActivationStore, block: torch.nn.Module, call: BlockCall, compute_dtype: torch.dtype) -> None:
    """Overwrites a stream with the block's output.

    Raises:
        InputError: the stream is kept in a dtype that does not hold it.
    """
    with _autocast(store.device, compute_dtype):
        for start, stop in forward_spans(store):
            store.write(start, call.run(block, store.read(start, stop)))
    store.check_range()


@torch.no_grad()
def validate(block: TrainableBlock, call: BlockCall, streams: Streams, dtype: torch.dtype) -> float | None:
    """Mean squared error of the block over a split, a mean over all its elements; None when it is empty."""
    count = len(streams.full)
    if not count:
        return None
    total = torch.zeros((), device=streams.full.device)
    for start, stop in forward_spans(streams.full):
        with _autocast(streams.full.device, dtype):
            output = block(call, streams.quantized.read(start, stop))
        total += _loss(output, streams.full.read(start, stop)) * (stop - start)
    return total.item() / count


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.float(), target.float())


class _Losses:
    """Losses of one epoch, kept on the device and checked from time to time."""

    def __init__(self, steps: int, epoch: int, device: torch.device, settings: BlockApSettings, task: Task) -> None:
        self._values = torch.zeros(steps, device=device)
        self._steps, self._epoch, self._settings, self._task = steps, epoch, settings, task
        self._every = CHECK_EVERY if device.type == "cuda" else 1
        self._checked, self._sum = 0, 0.0

    def record(self, step: int, loss: Tensor) -> None:
        self._values[step] = loss.detach()
        if (step + 1) % self._every == 0 or step + 1 == self._steps:
            self._look(step + 1)

    def _look(self, done: int) -> None:
        recent = self._values[self._checked : done].tolist()
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


def _optimizer(block: TrainableBlock, settings: BlockApSettings) -> torch.optim.AdamW:
    groups = []
    for parameters, lr in (
        (block.scales(), settings.lr_scale),
        (block.zeros(), settings.lr_zero),
        (block.weights(), settings.lr_weight),
    ):
        for parameter in parameters:
            parameter.requires_grad_(lr > 0)
        if lr > 0:
            groups.append({"params": parameters, "lr": lr, "peak_lr": lr})
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def train_block(
    block: TrainableBlock, call: BlockCall, train: Streams, val: Streams, settings: BlockApSettings, task: Task
) -> tuple[list[float], list[float | None]]:
    """Trains a block in place.

    Args:
        block: the block, on the streams' device.
        call: its arguments besides the hidden states.
        train: quantized stream in, full-precision stream as the target.
        val: the same for the validation split; may be empty.
        settings: epochs, batch size and learning rates.
        task: is told every step.

    Returns:
        Mean training loss and validation loss of every epoch.

    Raises:
        TrainingDivergedError: a loss is NaN or infinite.
    """
    device, dtype = train.full.device, settings.resolved_compute_dtype()
    count, batch = len(train.full), settings.batch_size
    steps = math.ceil(count / batch)
    optimizer = _optimizer(block, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    train_losses: list[float] = []
    val_losses: list[float | None] = []
    for epoch in range(settings.epochs):
        losses = _Losses(steps, epoch, device, settings, task)
        for step in range(steps):
            now, start, stop = epoch * steps + step, step * batch, min((step + 1) * batch, count)
            for group in optimizer.param_groups:
                group["lr"] = cosine(now, settings.epochs * steps, group["peak_lr"], settings.min_lr_factor)
            with _autocast(device, dtype):
                output = block(call, train.quantized.read(start, stop))
            loss = _loss(output, train.full.read(start, stop))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.record(step, loss)
        train_losses.append(losses.mean())
        val_loss = validate(block, call, val, dtype)
        val_losses.append(val_loss)
        if val_loss is not None and not math.isfinite(val_loss):
            raise _diverged(val_loss, f"epoch {epoch}, validation", settings)
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
        raise _diverged(math.nan, "the end of the last epoch", settings)  # the last update is after the last loss
    return train_losses, val_losses
