"""The loop of E2E-QAT: the loss of the whole model, AdamW on everything that quantization rounds.

A value that is not finite stops the run one step late, before anything is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from formats.errors import InputError, TrainingDivergedError

from ..data import TokenWindows
from ..e2e_qp.fused_modules import fused_modules
from ..e2e_qp.head import find_head
from ..e2e_qp.next_token import mean_loss
from ..e2e_qp.recompute import recomputed_in_backward
from ..end_to_end.schedule import learning_rate_factor
from ..end_to_end.state import DamagedStateError, E2eProgress, E2eState
from ..reporting.progress import Reporter
from ..resume.stopping import StopAfterStep
from .latent_model import LatentModel
from .loss import distillation_loss
from .settings import QatSettings

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
        passes = math.ceil(settings.batch_size / max(1, MICRO_TOKENS[kind] // seq_len))
        self.micro_batch_size = settings.micro_batch_size or math.ceil(settings.batch_size / passes)
        self.recompute = self._recomputes(self.micro_batch_size * seq_len)
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.val_loss_before: float | None = None
        self._saved = time.monotonic()

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
            StopAfterStep() as stop,
        ):
            done = len(self.losses)
            task.update(done)
            running: tuple[int, float, Tensor] | None = None
            for number, rows in enumerate(islice(self._batches(len(data)), done, None), done):
                factor = learning_rate_factor(number, steps, settings.warmup_ratio)
                values = self._step(optimizer, data.take(rows), head, factor)
                if running is not None:
                    task.update(1, loss=self._finish(*running, steps))
                running = number, factor, values
                if stop.requested or time.monotonic() - self._saved >= SAVE_SECONDS:
                    task.update(1, loss=self._finish(*running, steps))
                    running = None
                    self._save(optimizer)
                stop.check()
            if running is not None:
                task.update(1, loss=self._finish(*running, steps))
        if not all(bool(parameter.isfinite().all()) for parameter in latent.parameters):
            _diverged("a parameter is not finite", f"step {steps}")

    def validate(self, windows: TokenWindows, when: str) -> float:
        """Mean next-token loss over the windows' target tokens."""
        with self._computing():
            loss = mean_loss(self.latent.model, windows, self.micro_batch_size, self.device).item()
        if not math.isfinite(loss):
            _diverged(f"validation loss {loss}", f"step {len(self.losses)}")
        self.reporter.event("qat_validation", when=when, loss=loss)
        return loss

    def _step(self, optimizer: torch.optim.Optimizer, batch: TokenWindows, head: Any, factor: float) -> Tensor:
        """Loss and gradient norm ``[2]``, on the device."""
        loss = torch.zeros((), device=self.device)
        for part in batch.batches(self.micro_batch_size):
            ids, labels = part.input_ids.to(self.device), part.labels.to(self.device)
            with self._computing():
                own = self._loss(ids, labels, head, 1 / batch.loss_tokens)
            own.backward()
            loss += own.detach()
        self.latent.hand_gradients_over()
        norm = torch.nn.utils.clip_grad_norm_(self.latent.parameters, self.settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.latent.take_masters()
        return torch.stack([loss, norm])

    def _optimizer(self) -> torch.optim.Optimizer:
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(self.latent.groups, betas=BETAS, weight_decay=self.settings.weight_decay, fused=fused)

    def _loss(self, ids: Tensor, labels: Tensor, head: Any, scale: float) -> Tensor:
        """``scale`` times the sum over the target tokens."""
        return distillation_loss(self.latent.model, self.teacher, head, ids, labels, self.settings.distill, scale)

    def _finish(self, number: int, factor: float, values: Tensor, steps: int) -> float:
        loss, norm = values.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            _diverged(f"loss {loss}, gradient norm {norm}", f"step {number + 1} of {steps}")
        self.losses.append(loss)
        self.grad_norms.append(norm)
        self.reporter.event("qat_step", step=number + 1, loss=loss, lr=self.settings.lr_weight * factor, grad_norm=norm)
        return float(loss)

    def _batches(self, windows: int) -> Iterator[Tensor]:
        """Rows of every step of the run."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        for _ in range(self.settings.epochs):
            yield from torch.randperm(windows, generator=generator).split(self.settings.batch_size)

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
        kept = 2 * tokens * width * self.settings.resolved_compute_dtype().itemsize
        return kept > FREE_SHARE * torch.cuda.mem_get_info(self.device)[0]

    def _resume(self, optimizer: torch.optim.Optimizer, steps: int) -> bool:
        try:
            progress = self.state.load(self.latent.parameters, optimizer)
        except DamagedStateError as damage:
            self.reporter.message(f"{damage}; E2E-QAT starts again")
            return False
        if progress is None:
            return False
        self.latent.take_masters()
        self.losses, self.grad_norms = list(progress.losses), list(progress.grad_norms)
        self.val_loss_before = progress.val_loss_before
        self.reporter.message(f"going on with an unfinished E2E-QAT: {len(self.losses)} of {steps} steps are done")
        return True

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        progress = E2eProgress(tuple(self.losses), tuple(self.grad_norms), self.val_loss_before)
        self.state.save(self.latent.parameters, optimizer, progress)
        self._saved = time.monotonic()


def _diverged(what: str, where: str) -> NoReturn:
    raise TrainingDivergedError(f"E2E-QAT diverged: {what} at {where}; nothing was written, lower the learning rates")


def check_memory(weights: int, parameters: int, device: torch.device) -> None:
    """Refuses a model whose training state does not fit.

    Args:
        weights: in layers that are trained.
        parameters: of the whole model.
        device: to train on.

    Raises:
        InputError: it is a GPU with less memory free.
    """
    if device.type != "cuda":
        return
    # fp32 model; gradient and two moments of the trained weights; the teacher in 16 bits
    needed = 4 * parameters + 12 * weights + 2 * parameters
    free = torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise InputError(
            f"E2E-QAT keeps {needed / 2**30:.1f} GiB of weights, gradients and moments on the GPU and "
            f"{free / 2**30:.1f} GiB are free; use --recipe paper, which trains a block at a time"
        )
