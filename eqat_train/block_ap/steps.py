"""One training step of a block: forward, mean squared error, backward, AdamW.

``AutogradSteps`` differentiates through the quantizer and lets torch's AdamW update every parameter; that is what runs
on a CPU, and in float16, whose gradients need scaling. ``FusedSteps`` differentiates with respect to the dequantized
weights and leaves the quantizer's backward pass, AdamW and the next dequantized weights to one pass over each weight;
none of it waits for the device, so ``GraphedSteps`` can replay it as one CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from formats.errors import InputError

from ..error_text import first_line
from ..models.experts import Experts
from ..ops.fake_quant_adamw import AdamW, Moments, fake_quant_adamw_, schedule_row
from ..ranks.gradients import gradient_mean
from ..ranks.group import agreed
from .capture import BlockCall
from .differentiation import Differentiation
from .passes import autocast, reconstruction_loss
from .trainable_block import TrainableBlock

if TYPE_CHECKING:
    from .settings import BlockApSettings

__all__ = ["AutogradSteps", "FusedSteps", "GraphedSteps", "Steps", "block_steps", "cosine"]

# Where a block's matmuls take this long, half a minute of compiling pays; blocks of one kind share what it makes.
COMPILE_SECONDS, MATMUL_RATE = 20, 4e14
WARMUP_STEPS = 2  # before a graph is captured: libraries load, kernels compile, the optimizer makes its state


class Steps(Protocol):
    """Trains a block a batch at a time; a step returns its loss, on the device."""

    def __call__(self, hidden_states: Tensor, target: Tensor) -> Tensor: ...

    def trained(self) -> Iterator[Tensor]:
        """Every parameter that the steps change."""

    def close(self) -> None:
        """Leaves the block with its parameters alone."""


def cosine(step: int, total: int, lr: float, min_lr_factor: float) -> float:
    """Learning rate of a step, 0..total: from ``lr`` down to ``lr / min_lr_factor``."""
    lowest = lr / min_lr_factor
    return lowest + (lr - lowest) * (1 + math.cos(math.pi * step / total)) / 2


def block_steps(
    block: TrainableBlock,
    call: BlockCall,
    settings: BlockApSettings,
    total: int,
    example: Tensor,
    message: Callable[[str], None],
) -> Steps:
    """The steps that fit a device and a compute dtype.

    Args:
        block: to train in place.
        call: its arguments besides the hidden states.
        settings: learning rates and the like.
        total: steps of the whole training, which the learning rates fall over.
        example: hidden states of one sample ``[seq, hidden]``, where the block is.
        message: is told what cannot be done as asked and what is done instead.
    """
    if not settings.fuses_steps():
        return AutogradSteps(block, call, settings, total, example.device)
    steps = FusedSteps(block, call, settings, total, example.device)
    if has_experts(block):
        if settings.execution in ("graph", "compile"):
            raise InputError(
                f"execution is {settings.execution}, but each expert of this mixture gets other tokens in every step, "
                "which no graph or compiled step allows for; use execution auto or eager"
            )
        if settings.execution == "auto":
            message("steps run without a CUDA graph: each expert of a mixture gets other tokens in every step")
        return steps
    if settings.execution == "eager":
        return steps
    notify = message if settings.execution == "auto" else None
    weights = sum(linear.weight.numel() for linear in block.linears.values())
    seconds = 6 * total * settings.batch_size * example.shape[0] * weights / MATMUL_RATE
    if settings.execution == "compile" or (notify is not None and seconds > COMPILE_SECONDS):
        message("compiling the block's step: about half a minute, once for all blocks of a kind")
        steps.differentiate.compile(notify)
    return GraphedSteps(steps, notify)


class AutogradSteps:
    """The plain loop."""

    def __init__(
        self, block: TrainableBlock, call: BlockCall, settings: BlockApSettings, total: int, device: torch.device
    ) -> None:
        self._block, self._call, self._settings, self._total, self._device = block, call, settings, total, device
        self._dtype = settings.resolved_compute_dtype()
        self._optimizer = _optimizer(block, settings)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._dtype == torch.float16)
        self._mean = gradient_mean(self.trained(), sparse=has_experts(block))
        self._step = 0

    def __call__(self, hidden_states: Tensor, target: Tensor) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = cosine(self._step, self._total, group["peak_lr"], self._settings.min_lr_factor)
        with autocast(self._device, self._dtype):
            output = self._block(self._call, hidden_states)
        loss = reconstruction_loss(output, target)
        self._scaler.scale(loss).backward()
        if self._mean is not None:
            self._mean.finish()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        return loss.detach()

    def trained(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def close(self) -> None:
        if self._mean is not None:
            self._mean.close()


def has_experts(block: TrainableBlock) -> bool:
    """Whether it depends on the tokens which of the block's linears a step uses."""
    return any(isinstance(module, Experts) for module in block.block.modules())


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


class FusedSteps:
    """Dequantized weights are the leaves of the backward pass; see :mod:`eqat_train.ops.fake_quant_adamw`."""

    def __init__(
        self, block: TrainableBlock, call: BlockCall, settings: BlockApSettings, total: int, device: torch.device
    ) -> None:
        self._block = block
        self._adamw = AdamW(settings.weight_decay)
        peaks = (settings.lr_weight, settings.lr_scale, settings.lr_zero)
        rows = [
            schedule_row(step, [cosine(step, total, peak, settings.min_lr_factor) for peak in peaks], self._adamw)
            for step in range(total)
        ]
        self._schedule = torch.tensor(rows, dtype=torch.float32, device=device)  # [steps, 5]
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._moments = {}
        for name, linear in block.linears.items():
            parameters = (linear.weight, linear.scales, linear.zeros)
            for parameter in parameters:
                parameter.requires_grad_(False)
            first, second, third = (Moments.of(p) if lr > 0 else None for p, lr in zip(parameters, peaks, strict=True))
            self._moments[name] = first, second, third
            linear.dequantized = linear.quantize_dequantize(settings.resolved_compute_dtype()).requires_grad_()
        others = list(block.others.values())
        for parameter in others:
            parameter.requires_grad_(settings.lr_weight > 0)
        self._lr = self._schedule[0, 0].clone()
        self._others = None
        if others and settings.lr_weight > 0:
            self._others = torch.optim.AdamW(
                others,
                lr=self._lr,
                weight_decay=settings.weight_decay,
                fused=True,
                capturable=device.type == "cuda",
            )
        self.differentiate = Differentiation(block, call, settings)
        self._mean = gradient_mean(block.leaves(), sparse=has_experts(block))

    def __call__(self, hidden_states: Tensor, target: Tensor) -> Tensor:
        loss = self.differentiate(hidden_states, target)
        if self._mean is not None:
            self._mean.finish()
        for name, linear in self._block.linears.items():
            dequantized = linear.dequantized
            if dequantized is None or dequantized.grad is None:
                continue  # a linear that the block's forward does not use
            fake_quant_adamw_(
                linear.weight,
                linear.scales,
                linear.zeros,
                dequantized.grad,
                dequantized,
                self._moments[name],
                self._schedule,
                self._step,
                self._adamw,
                linear.scheme.bits,
                linear.scheme.group_size,
                linear.scale_dtype,
                linear.zero_range,
                impl=linear.impl,
            )
            dequantized.grad = None
        if self._others is not None:
            self._lr.copy_(self._schedule.index_select(0, self._step.view(1))[0, 0])
            self._others.step()
            self._others.zero_grad(set_to_none=True)
        self._step.add_(1)
        return loss

    def trained(self) -> Iterator[Tensor]:
        for name, linear in self._block.linears.items():
            parameters = (linear.weight, linear.scales, linear.zeros)
            yield from (p for p, both in zip(parameters, self._moments[name], strict=True) if both is not None)
        if self._others is not None:
            yield from self._block.others.values()

    def close(self) -> None:
        if self._mean is not None:
            self._mean.close()
        for linear in self._block.linears.values():
            linear.dequantized = None


class GraphedSteps:
    """Replays a step as one CUDA graph, captured after the first few; batches of another size run without it.

    Args:
        steps: what to capture.
        message: is told when that is impossible and steps run singly; None to raise InputError instead.
    """

    def __init__(self, steps: FusedSteps, message: Callable[[str], None] | None) -> None:
        self._steps, self._message = steps, message
        self._graph: torch.cuda.CUDAGraph | None = None
        self._before_capture = WARMUP_STEPS
        self._shape: torch.Size | None = None
        self._hidden_states = self._target = self._loss = torch.empty(0)

    def __call__(self, hidden_states: Tensor, target: Tensor) -> Tensor:
        self._shape = self._shape or hidden_states.shape
        if hidden_states.shape != self._shape:
            return self._steps(hidden_states, target)
        if self._before_capture == 0:
            self._capture(hidden_states, target)
        self._before_capture -= 1
        if self._graph is None:
            return self._steps(hidden_states, target)
        self._hidden_states.copy_(hidden_states)
        self._target.copy_(target)
        self._graph.replay()
        return self._loss

    def _capture(self, hidden_states: Tensor, target: Tensor) -> None:
        self._hidden_states, self._target = torch.empty_like(hidden_states), torch.empty_like(target)
        graph, failure = torch.cuda.CUDAGraph(), None
        try:
            # the thread that fetches batches goes on meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = self._steps(self._hidden_states, self._target)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failure = error
            _renew_generator(self._target.device)
        if agreed(failure is None):  # a reduction in a graph needs graphs on all ranks
            self._graph = graph
            return
        text = f"the block's step cannot be a CUDA graph ({first_line(failure) if failure else 'on another rank'})"
        if self._message is None:
            raise InputError(f"{text}; use execution auto or eager") from failure
        self._message(f"{text}; it runs without one, slower")

    def trained(self) -> Iterator[Tensor]:
        return self._steps.trained()

    def close(self) -> None:
        self._graph = None  # gives its memory back
        self._steps.close()


def _renew_generator(device: torch.device) -> None:
    """In torch 2.11 a capture that fails leaves the device's generator refusing random numbers outside of captures."""
    generator = torch.cuda.default_generators[device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())
