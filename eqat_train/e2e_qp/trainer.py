"""The loop of E2E-QP on a model in memory: micro-batches, AdamW, and what was measured.

The device never waits for the host: loss and gradient norm of a step are read while the next one runs. A value that
is not finite stops the run one step late, before anything is written; what that step computes is thrown away.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

import torch
from torch import Tensor

from formats.errors import InputError, TrainingDivergedError

from ..data import TokenWindows
from ..end_to_end.schedule import batches, learning_rate_factor
from ..end_to_end.shares import check_same_progress, own_windows, sum_step_
from ..end_to_end.state import DamagedStateError, E2eProgress, E2eState
from ..models.experts import Experts
from ..ranks.divergence import check_same
from ..ranks.group import largest, rank, size, total
from ..reporting.progress import Reporter
from ..resume.stopping import StopAfterStep
from .fused_modules import fused_modules
from .next_token import accumulate_gradients, mean_loss
from .packed_model import PackedModel
from .recompute import least_memory, most_memory, plan_recomputing, recomputed_in_backward
from .settings import E2eSettings

__all__ = ["Trainer"]

# Seconds between two savings of the state.
SAVE_SECONDS = 300
# Tokens beyond which a larger micro-batch no longer makes the matmuls faster, and the fewest at which a smaller one
# still costs less than recomputing (benchmarks/loops/e2e_qp_step.py).
MICRO_TOKENS = {"cpu": 4096, "cuda": 16384}
FEWEST_TOKENS = 4096
# Bytes that forward may keep for backward on a CPU; on a GPU it is a share of what is free.
ACTIVATION_BUDGET = 2**30
FREE_SHARE = 0.6


@dataclass(frozen=True)
class _Step:
    """A step that was started: its loss and gradient norm, on their way to the host."""

    number: int
    lr: float
    values: Tensor  # [2], and of several ranks how many have been told to stop
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[float, float, bool]:
        """Waits for the values: loss, gradient norm, and whether a rank has been told to stop."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, *stopping = self.values.tolist()
        return loss, norm, any(stopping)


class Trainer:
    """Trains the scales of a model in memory and keeps what was measured.

    Attributes:
        losses: of each optimizer step, before it.
        grad_norms: of each step, before clipping.
        lr: peak learning rate.
        val_loss_before: None before it is measured, or without validation data.
    """

    def __init__(
        self, packed: PackedModel, settings: E2eSettings, seq_len: int, reporter: Reporter, state: E2eState
    ) -> None:
        self.packed, self.settings, self.reporter, self.state = packed, settings, reporter, state
        self.device = settings.resolved_device()
        self.lr = settings.resolved_lr(max(linear.bits for linear in packed.linears.values()))
        self._budget = self._activation_budget()
        fitting = settings.micro_batch_size or self._fitting_micro_batch_size(seq_len)
        self.micro_batch_size = -largest(-min(fitting, settings.batch_size // size()))
        self.kept = self._plan(self.micro_batch_size * seq_len)
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.val_loss_before: float | None = None
        self._saved = time.monotonic()
        self._stop, self._stops_together = StopAfterStep(), False
        self._sparse = any(isinstance(module, Experts) for module in packed.model.modules())

    def train(self, data: TokenWindows, val: TokenWindows | None) -> None:
        """All epochs, each in an order of its own, from where an earlier run stopped."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.packed.scales, lr=self.lr, weight_decay=settings.weight_decay, fused=self.device.type == "cuda"
        )
        steps = settings.epochs * math.ceil(len(data) / settings.batch_size)
        if not self._resume(optimizer, steps) and val is not None:
            self.val_loss_before = self.validate(val, "before")
        with (
            self._kernels(),
            recomputed_in_backward(self.packed.layers, self.kept),
            self.reporter.task("E2E-QP", steps) as task,
            StopAfterStep() as self._stop,
        ):
            done = len(self.losses)
            task.update(done)
            running: deque[_Step] = deque()

            def finish(unread: int) -> None:
                while len(running) > unread:
                    step = running.popleft()
                    task.update(1, loss=self._finish(step, steps), lr=step.lr)

            for number, rows in enumerate(islice(batches(len(data), settings), done, None), done):
                lr = self.lr * learning_rate_factor(number, steps, settings.warmup_ratio)
                running.append(self._step(optimizer, data.take(rows), number, lr))
                finish(unread=1 if self.device.type == "cuda" else 0)
                together = self._stops_together if size() > 1 else None
                if together or (together is None and self._stop.requested) or self._save_is_due():
                    finish(unread=0)
                    self._save(optimizer)
                self._stop.check(together)
            finish(unread=0)
        check_same({name: linear.scales for name, linear in self.packed.linears.items()}, "E2E-QP's scales")
        if not all(bool(linear.stored_scales().isfinite().all()) for linear in self.packed.linears.values()):
            _diverged("a scale is not finite", f"step {steps}, peak lr {self.lr:g}")

    def _resume(self, optimizer: torch.optim.AdamW, steps: int) -> bool:
        try:
            progress = self.state.load(self.packed.scales, optimizer)
        except DamagedStateError as damage:
            self.reporter.message(f"{damage}; E2E-QP starts again from its checkpoint")
            progress = None
        check_same_progress(0 if progress is None else len(progress.losses), "E2E-QP")
        if progress is None:
            return False
        self.losses, self.grad_norms = list(progress.losses), list(progress.grad_norms)
        self.val_loss_before = progress.val_loss_before
        self.reporter.message(f"going on with an unfinished E2E-QP: {len(self.losses)} of {steps} steps are done")
        return True

    def _save_is_due(self) -> bool:
        return rank() == 0 and time.monotonic() - self._saved >= SAVE_SECONDS

    def _save(self, optimizer: torch.optim.AdamW) -> None:
        if rank():
            return
        progress = E2eProgress(tuple(self.losses), tuple(self.grad_norms), self.val_loss_before)
        self.state.save(self.packed.scales, optimizer, progress)
        self._saved = time.monotonic()

    def validate(self, windows: TokenWindows, when: str) -> float:
        """Mean loss over the windows' target tokens."""
        with self._kernels():
            own = own_windows(windows)
            loss = total(
                mean_loss(self.packed.model, own, self.micro_batch_size, self.device, targets=windows.loss_tokens)
            ).item()
        if not math.isfinite(loss):
            if not self.losses:
                raise InputError(
                    f"the starting checkpoint's validation loss is {loss}; it cannot be trained, verify it"
                )
            _diverged(f"validation loss {loss}", f"step {len(self.losses)}, peak lr {self.lr:g}")
        self.reporter.event("e2e_validation", when=when, loss=loss)
        return loss

    def memory(self) -> dict[str, int]:
        """Bytes on a GPU by what they hold; empty on a CPU. What is left of the peak are activations."""
        if self.device.type != "cuda":
            return {}
        linears = self.packed.linears.values()
        tensors = [*self.packed.model.parameters(), *self.packed.model.buffers()]
        scales = sum(_nbytes(linear.scales) for linear in linears)
        packed = sum(_nbytes(linear.qweight) + _nbytes(linear.qzeros) for linear in linears)
        everything = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        dense = everything - packed - scales
        # the scales' gradient and AdamW's two moments
        return {"packed_weights": packed, "scales": scales, "training": 3 * scales, "dense": dense}

    def _step(self, optimizer: torch.optim.Optimizer, batch: TokenWindows, number: int, lr: float) -> _Step:
        own, targets = own_windows(batch), batch.loss_tokens
        loss = accumulate_gradients(self.packed.model, own, self.micro_batch_size, self.device, targets=targets)
        figures = []
        if size() > 1:
            loss, *figures = sum_step_(self.packed.scales, loss, self._stop.requested, sparse=self._sparse)
        norm = torch.nn.utils.clip_grad_norm_(self.packed.scales, self.settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values, arrived = torch.stack([loss, norm, *figures]), None
        if self.device.type == "cuda":
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return _Step(number, lr, values, arrived)

    def _finish(self, step: _Step, steps: int) -> float:
        loss, norm, stopping = step.read()
        self._stops_together = self._stops_together or stopping
        if not (math.isfinite(loss) and math.isfinite(norm)):
            _diverged(f"loss {loss}, gradient norm {norm}", f"step {step.number + 1} of {steps}, lr {step.lr:g}")
        self.losses.append(loss)
        self.grad_norms.append(norm)
        self.reporter.event("e2e_step", step=step.number + 1, loss=loss, lr=step.lr, grad_norm=norm)
        return loss

    def _activation_budget(self) -> int:
        if self.settings.activation_budget is not None:
            return self.settings.activation_budget
        if self.device.type == "cuda":
            return int(FREE_SHARE * torch.cuda.mem_get_info(self.device)[0])
        return ACTIVATION_BUDGET

    def _fitting_micro_batch_size(self, seq_len: int) -> int:
        """Windows a pass that fill the device, the batch cut evenly; on a GPU no more than its memory takes."""
        batch_size, itemsize = self.settings.batch_size, self.settings.resolved_compute_dtype().itemsize
        gpu = self.device.type == "cuda"
        layers = list(self.packed.layers)

        def fits(size: int) -> bool:
            memory = most_memory if (size - 1) * seq_len >= FEWEST_TOKENS else least_memory
            return memory(layers, size * seq_len, itemsize) <= self._budget

        passes = math.ceil(batch_size / max(1, MICRO_TOKENS["cuda" if gpu else "cpu"] // seq_len))
        size = math.ceil(batch_size / passes)
        while gpu and size > 1 and not fits(size):
            passes += 1
            size = math.ceil(batch_size / passes)
        return size

    def _plan(self, tokens: int) -> list[int | None]:
        """What each layer keeps for backward."""
        if self.settings.gradient_checkpointing is not None:
            return [0 if self.settings.gradient_checkpointing else None] * len(self.packed.layers)
        itemsize = self.settings.resolved_compute_dtype().itemsize
        return plan_recomputing(list(self.packed.layers), tokens, itemsize, self._budget)

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        with fused_modules(self.packed.model) if self.device.type == "cuda" else nullcontext():
            yield


def _diverged(what: str, where: str) -> NoReturn:
    raise TrainingDivergedError(
        f"E2E-QP diverged: {what} at {where}; nothing was written and the starting checkpoint is unchanged, "
        "start from it again with a lower learning rate"
    )


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
