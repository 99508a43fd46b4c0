"""The loop of E2E-QAT: the loss of the whole model, AdamW on everything that quantization rounds.

A value that is not finite stops the run one step late, before anything is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from formats.errors import TrainingDivergedError

from ..data import TokenWindows
from ..e2e_qp.fused_modules import fused_modules
from ..e2e_qp.head import find_head
from ..e2e_qp.next_token import mean_loss
from ..e2e_qp.recompute import recomputed_in_backward
from ..end_to_end.schedule import batches, learning_rate_factor
from ..end_to_end.shares import check_same_progress, own_windows
from ..end_to_end.state import DamagedStateError, E2eProgress, E2eState
from ..models.experts import Experts
from ..ranks.divergence import check_same
from ..ranks.group import agreed, largest, rank, size, total
from ..reporting.progress import Reporter
from ..resume.stopping import StopAfterStep
from .latent_model import LatentModel
from .loss import distillation_loss
from .settings import QatSettings
from .sum_step import StepFigures, sum_and_clip_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["QatTrainer"]

# Seconds between two savings of the state.
SAVE_SECONDS = 600
# Tokens beyond which a larger micro-batch no longer makes the matmuls faster.
MICRO_TOKENS = {"cpu": 4096, "cuda": 16384}
# Share of the free memory that a pass may take before layers are recomputed.
FREE_SHARE = 0.5
BETAS = (0.9, 0.95)


class QatTrainer:
    """Trains a latent model and keeps what was measured.

    Attributes:
        losses: of each optimizer step, before it.
        grad_norms: of each step, before clipping.
        val_loss_before: None before it is measured, or without validation data.
    """

    def __init__(
        self,
        latent: LatentModel,
        teacher: PreTrainedModel,
        settings: QatSettings,
        seq_len: int,
        reporter: Reporter,
        state: E2eState,
    ) -> None:
        self.latent, self.teacher, self.settings, self.reporter, self.state = latent, teacher, settings, reporter, state
        self.device = settings.resolved_device()
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        own = settings.batch_size // size()
        passes = math.ceil(own / max(1, MICRO_TOKENS[kind] // seq_len))
        self.micro_batch_size = min(own, settings.micro_batch_size or math.ceil(own / passes))
        # ranks that gather weights do so in step
        self.recompute = bool(largest(int(self._recomputes(self.micro_batch_size * seq_len))))
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.val_loss_before: float | None = None
        self._saved = time.monotonic()
        self._stop, self._told = StopAfterStep(), StepFigures(0.0, 0.0, stopping=False, saving=False)
        self._sparse = any(isinstance(module, Experts) for module in latent.model.modules())

    def train(self, data: TokenWindows, val: TokenWindows | None) -> None:
        """All epochs, each in an order of its own, from where an earlier run stopped."""
        settings, latent = self.settings, self.latent
        optimizer = self._optimizer()
        steps = settings.epochs * math.ceil(len(data) / settings.batch_size)
        if not self._resume(optimizer, steps) and val is not None:
            self.val_loss_before = self.validate(val, "before")
        head = self._head(data.input_ids[:1].to(self.device))
        with (
            recomputed_in_backward(latent.layers, None if self.recompute else [None] * len(latent.layers)),
            fused_modules(self.teacher) if self.device.type == "cuda" else nullcontext(),
            self.reporter.task("E2E-QAT", steps) as task,
            StopAfterStep() as self._stop,
        ):
            done = len(self.losses)
            task.update(done)
            running: tuple[int, float, Tensor] | None = None
            for number, rows in enumerate(islice(batches(len(data), settings), done, None), done):
                factor = learning_rate_factor(number, steps, settings.warmup_ratio)
                values = self._step(optimizer, data.take(rows), head, factor)
                if running is not None:
                    task.update(1, loss=self._finish(*running, steps))
                running = number, factor, values
                stopping, saving = self._wanted()
                if stopping or saving:
                    task.update(1, loss=self._finish(*running, steps))
                    running = None
                    self._save(optimizer)
                self._stop.check(stopping if size() > 1 else None)
            if running is not None:
                task.update(1, loss=self._finish(*running, steps))
        check_same(latent.masters, "E2E-QAT's norms and biases")
        if not agreed(all(bool(parameter.isfinite().all()) for parameter in latent.parameters)):
            _diverged("a parameter is not finite", f"step {steps}")

    def validate(self, windows: TokenWindows, when: str) -> float:
        """Mean next-token loss over the windows' target tokens."""
        own, targets = own_windows(windows), windows.loss_tokens
        with self._computing():
            part = mean_loss(self.latent.model, own, self.micro_batch_size, self.device, targets=targets)
        loss = total(part).item()
        if not math.isfinite(loss):
            _diverged(f"validation loss {loss}", f"step {len(self.losses)}")
        self.reporter.event("qat_validation", when=when, loss=loss)
        return loss

    def _step(self, optimizer: torch.optim.Optimizer, batch: TokenWindows, head: Any, factor: float) -> Tensor:
        """The step's figures ``[4]`` on the device, see :class:`StepFigures`."""
        loss = torch.zeros((), device=self.device)
        for part in own_windows(batch).batches(self.micro_batch_size):
            ids, labels = part.input_ids.to(self.device), part.labels.to(self.device)
            with self._computing():
                own = self._loss(ids, labels, head, 1 / batch.loss_tokens)
            own.backward()
            loss += own.detach()
        self.latent.hand_gradients_over()
        values = sum_and_clip_(
            self.latent,
            loss,
            self.settings.max_grad_norm,
            stopping=self._stop.requested,
            saving=self._save_is_due(),
            sparse=self._sparse,
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.latent.take_masters()
        return values

    def _optimizer(self) -> torch.optim.Optimizer:
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(self.latent.groups, betas=BETAS, weight_decay=self.settings.weight_decay, fused=fused)

    def _loss(self, ids: Tensor, labels: Tensor, head: Any, scale: float) -> Tensor:
        """``scale`` times the sum over the target tokens."""
        return distillation_loss(self.latent.model, self.teacher, head, ids, labels, self.settings.distill, scale)

    def _finish(self, number: int, factor: float, values: Tensor, steps: int) -> float:
        self._told = told = StepFigures.read(values)
        loss, norm = told.loss, told.grad_norm
        if not (math.isfinite(loss) and math.isfinite(norm)):
            _diverged(f"loss {loss}, gradient norm {norm}", f"step {number + 1} of {steps}")
        self.losses.append(loss)
        self.grad_norms.append(norm)
        self.reporter.event("qat_step", step=number + 1, loss=loss, lr=self.settings.lr_weight * factor, grad_norm=norm)
        return loss

    def _wanted(self) -> tuple[bool, bool]:
        """Whether to stop and whether to save now; of several ranks by the last figures, which all of them have."""
        if size() == 1:
            return self._stop.requested, self._save_is_due()
        return self._told.stopping, self._told.saving

    def _save_is_due(self) -> bool:
        return rank() == 0 and time.monotonic() - self._saved >= SAVE_SECONDS

    def _head(self, ids: Tensor) -> Any:
        """The head that both models share; None where logits have to be the models' own."""
        same = self.latent.model.get_output_embeddings()
        return find_head(self.teacher, ids) if isinstance(same, nn.Linear) else None

    @contextmanager
    def _computing(self) -> Iterator[None]:
        dtype = self.settings.resolved_compute_dtype()
        # the cast weights of frozen layers are kept within a pass
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            yield

    def _recomputes(self, tokens: int) -> bool:
        if self.settings.gradient_checkpointing is not None:
            return self.settings.gradient_checkpointing
        if self.device.type != "cuda":
            return False
        linears = self.latent.linears.values()
        width = sum(linear.in_features + linear.out_features for linear in linears)
        weights = sum(linear.weight.numel() for linear in linears)
        kept = (2 * tokens * width + weights) * self.settings.resolved_compute_dtype().itemsize
        training = 12 * sum(parameter.numel() for parameter in self.latent.parameters)  # gradients and moments
        return kept > FREE_SHARE * (torch.cuda.mem_get_info(self.device)[0] - training)

    def _resume(self, optimizer: torch.optim.Optimizer, steps: int) -> bool:
        try:
            progress = self.state.load(self.latent.parameters, optimizer, self.latent.rows)
        except DamagedStateError as damage:
            self.reporter.message(f"{damage}; E2E-QAT starts again")
            progress = None
        check_same_progress(0 if progress is None else len(progress.losses), "E2E-QAT")
        if progress is None:
            return False
        self.latent.take_masters()
        self.losses, self.grad_norms = list(progress.losses), list(progress.grad_norms)
        self.val_loss_before = progress.val_loss_before
        self.reporter.message(f"going on with an unfinished E2E-QAT: {len(self.losses)} of {steps} steps are done")
        return True

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        progress = E2eProgress(tuple(self.losses), tuple(self.grad_norms), self.val_loss_before)
        self.state.save(self.latent.parameters, optimizer, progress, self.latent.rows)
        self._told = replace(self._told, saving=False)
        self._saved = time.monotonic()


def _diverged(what: str, where: str) -> NoReturn:
    raise TrainingDivergedError(f"E2E-QAT diverged: {what} at {where}; nothing was written, lower the learning rates")
