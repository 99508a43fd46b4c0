"""E2E-QP: end-to-end training of quantization parameters (EfficientQAT, arXiv 2407.11062, section 3.3).

Packed codes and zero-points stay as they are; every scale of the model is trained by next-token cross-entropy with
AdamW, linear warm-up and cosine decay to zero, clipped by global norm. The model computes with its packed weights and
with scales rounded to the stored dtype, so the checkpoint that is written computes what training computed.

On labels: they are not shifted, and -100 marks tokens without loss. The loss of an optimizer step is the mean over
the target tokens of its whole batch, however it is cut into micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from formats.checkpoint import CheckpointWriter
from formats.errors import InputError, TrainingDivergedError
from formats.model import open_checkpoint

from ..data import NO_LOSS, TokenWindows
from ..hardware import peak_memory
from ..reporting.progress import Reporter
from ..resume.identity import folder_fingerprint, settings_identity, tensor_fingerprint
from ..resume.stage import StageRecord
from ..resume.stopping import StopAfterStep
from .next_token import accumulate_gradients, mean_loss, recomputed_in_backward
from .packed_model import PackedModel, load_packed_model, write_trained
from .settings import E2eReport, E2eSettings
from .state import DamagedStateError, E2eProgress, E2eState

__all__ = ["E2eReport", "E2eSettings", "learning_rate_factor", "run_e2e_qp"]

# Seconds between two savings of the state.
SAVE_SECONDS = 300
# Bytes that one micro-batch may take before it is cut smaller (logits) or recomputed (activations).
LOGITS_BUDGET = {"cpu": 2**28, "cuda": 2**32}
ACTIVATION_BUDGET = 2**30
# Tokens beyond which a larger micro-batch no longer makes the matmuls faster.
MICRO_TOKENS = {"cpu": 4096, "cuda": 16384}


def run_e2e_qp(
    checkpoint: Path,
    data: TokenWindows,
    settings: E2eSettings,
    out: Path,
    *,
    val: TokenWindows | None = None,
    work_dir: Path,
    reporter: Reporter,
    shard_size: int = 5 * 2**30,
    force: bool = False,
    trust_remote_code: bool = False,
) -> E2eReport:
    """Trains the scales of a quantized checkpoint and writes the result as a native checkpoint.

    Args:
        checkpoint: folder of a finished checkpoint in any readable quantized format; it is only read.
        data: training windows.
        settings: see :class:`E2eSettings`.
        out: folder to write; it appears when training has finished, and not at all if it fails.
        val: windows whose loss is measured before and after.
        work_dir: folder for the state of the training, saved every few minutes and when it is interrupted. A run that
            stopped goes on from it when everything that it depends on is as it was.
        reporter: told of progress.
        shard_size: bytes a weight file.
        force: replace an existing ``out``.
        trust_remote_code: allow Python files of the folder to run.

    Raises:
        InputError: data or a checkpoint that cannot be trained on, or not those of the run in ``work_dir``.
        OutputExistsError: ``out`` exists and ``force`` is off.
        TrainingDivergedError: a loss, gradient or scale became NaN or infinite.
    """
    start = time.perf_counter()
    _check_targets(data, val)
    device = settings.resolved_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    work_dir.mkdir(parents=True, exist_ok=True)
    identity = _identity(checkpoint, data, val, settings)
    record = StageRecord(work_dir / "e2e-qp.written.json", identity)
    if (written := record.written(out)) is not None:
        reporter.message(f"E2E-QP's checkpoint is finished: {out}")
        return E2eReport(**{**written, "losses": tuple(written["losses"]), "grad_norms": tuple(written["grad_norms"])})
    with open_checkpoint(checkpoint) as source, CheckpointWriter(out, shard_size=shard_size, force=force) as writer:
        packed = load_packed_model(
            source,
            scale_dtype=settings.scale_dtype,
            compute_dtype=settings.resolved_compute_dtype(),
            device=device,
            trust_remote_code=trust_remote_code,
        )
        _check_token_ids(packed.vocabulary, data, val)
        state = E2eState(work_dir / "e2e-qp", identity)
        trainer = _Trainer(packed, settings, data.seq_len, reporter, state)
        trainer.train(data, val)
        after = None if val is None else trainer.validate(val, "after")
        report = E2eReport(
            losses=tuple(trainer.losses),
            grad_norms=tuple(trainer.grad_norms),
            val_loss_before=trainer.val_loss_before,
            val_loss_after=after,
            lr=trainer.lr,
            scales=sum(scale.numel() for scale in packed.scales),
            tokens=data.input_ids.numel() * settings.epochs,
            seconds=time.perf_counter() - start,
            peak_memory=peak_memory(device),
        )
        record.begin(out, asdict(report))
        write_trained(writer, source, packed.linears)
    record.done(out, asdict(report))
    state.remove()
    return report


def _identity(checkpoint: Path, data: TokenWindows, val: TokenWindows | None, settings: E2eSettings) -> dict[str, Any]:
    """What the trained scales depend on."""
    return {
        "settings": settings_identity(settings, without=("device", "compute_dtype"))
        | {"device": settings.resolved_device().type, "dtype": str(settings.resolved_compute_dtype())},
        "the checkpoint's weights": folder_fingerprint(checkpoint),
        "the training windows": tensor_fingerprint(data.input_ids, data.labels),
        "the validation windows": None if val is None else tensor_fingerprint(val.input_ids, val.labels),
    }


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step (from 0): linear up to 1, then cosine towards 0 at ``steps``.

    The first step already moves: of ``n`` warm-up steps, step ``i`` takes ``(i + 1) / n``.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class _Trainer:
    """Trains the scales of a model in memory and keeps what was measured."""

    def __init__(
        self, packed: PackedModel, settings: E2eSettings, seq_len: int, reporter: Reporter, state: E2eState
    ) -> None:
        self.packed, self.settings, self.reporter, self.state = packed, settings, reporter, state
        self.device = settings.resolved_device()
        self.lr = settings.resolved_lr(max(linear.bits for linear in packed.linears.values()))
        itemsize = settings.resolved_compute_dtype().itemsize
        self.micro_batch_size = settings.micro_batch_size or _micro_batch_size(
            settings.batch_size, seq_len, packed.vocabulary, itemsize, self.device
        )
        self.recompute = settings.gradient_checkpointing
        if self.recompute is None:
            features = sum(linear.in_features + linear.out_features for linear in packed.linears.values())
            self.recompute = self.micro_batch_size * seq_len * features * itemsize > ACTIVATION_BUDGET
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.val_loss_before: float | None = None
        self._saved = time.monotonic()

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
            recomputed_in_backward(self.packed.layers) if self.recompute else nullcontext(),
            self.reporter.task("E2E-QP", steps) as task,
            StopAfterStep() as stop,
        ):
            task.update(len(self.losses))
            for rows in islice(self._batches(len(data)), len(self.losses), None):
                done = len(self.losses)
                lr = self.lr * learning_rate_factor(done, steps, settings.warmup_ratio)
                loss, norm = self._step(optimizer, data.take(rows), lr, f"step {done + 1} of {steps}, lr {lr:g}")
                task.update(1, loss=loss, lr=lr)
                self.reporter.event("e2e_step", step=done + 1, loss=loss, lr=lr, grad_norm=norm)
                if stop.requested or time.monotonic() - self._saved >= SAVE_SECONDS:
                    self._save(optimizer)
                stop.check()
        if not all(bool(linear.stored_scales().isfinite().all()) for linear in self.packed.linears.values()):
            _diverged("a scale is not finite", f"step {steps}, peak lr {self.lr:g}")

    def _batches(self, windows: int) -> Iterator[Tensor]:
        """Rows of every step of the run."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        for _ in range(self.settings.epochs):
            yield from torch.randperm(windows, generator=generator).split(self.settings.batch_size)

    def _resume(self, optimizer: torch.optim.AdamW, steps: int) -> bool:
        try:
            progress = self.state.load(self.packed.scales, optimizer)
        except DamagedStateError as damage:
            self.reporter.message(f"{damage}; E2E-QP starts again from its checkpoint")
            return False
        if progress is None:
            return False
        self.losses, self.grad_norms = list(progress.losses), list(progress.grad_norms)
        self.val_loss_before = progress.val_loss_before
        self.reporter.message(f"going on with an unfinished E2E-QP: {len(self.losses)} of {steps} steps are done")
        return True

    def _save(self, optimizer: torch.optim.AdamW) -> None:
        progress = E2eProgress(tuple(self.losses), tuple(self.grad_norms), self.val_loss_before)
        self.state.save(self.packed.scales, optimizer, progress)
        self._saved = time.monotonic()

    def validate(self, windows: TokenWindows, when: str) -> float:
        """Mean loss over the windows' target tokens."""
        loss = mean_loss(self.packed.model, windows, self.micro_batch_size, self.device).item()
        if not math.isfinite(loss):
            if not self.losses:
                raise InputError(
                    f"the starting checkpoint's validation loss is {loss}; it cannot be trained, verify it"
                )
            _diverged(f"validation loss {loss}", f"step {len(self.losses)}, peak lr {self.lr:g}")
        self.reporter.event("e2e_validation", when=when, loss=loss)
        return loss

    def _step(
        self, optimizer: torch.optim.Optimizer, batch: TokenWindows, lr: float, where: str
    ) -> tuple[float, float]:
        loss = accumulate_gradients(self.packed.model, batch, self.micro_batch_size, self.device)
        norm = torch.nn.utils.clip_grad_norm_(self.packed.scales, self.settings.max_grad_norm)
        # The one wait for the device in a step, before anything that is not finite can reach the scales.
        loss_value, norm_value = torch.stack([loss, norm]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            _diverged(f"loss {loss_value}, gradient norm {norm_value}", where)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss_value)
        self.grad_norms.append(norm_value)
        return loss_value, norm_value


def _diverged(what: str, where: str) -> NoReturn:
    raise TrainingDivergedError(
        f"E2E-QP diverged: {what} at {where}; nothing was written and the starting checkpoint is unchanged, "
        "start from it again with a lower learning rate"
    )


def _micro_batch_size(batch_size: int, seq_len: int, vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Windows a pass that fill the device within the budget for logits, the batch cut evenly."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    logits = seq_len * vocabulary * (itemsize + 8)  # in the compute dtype, and in float32 with their gradient
    most = max(1, min(LOGITS_BUDGET[kind] // logits, MICRO_TOKENS[kind] // seq_len))
    return math.ceil(batch_size / math.ceil(batch_size / most))


def _check_targets(data: TokenWindows, val: TokenWindows | None) -> None:
    empty = ~(data.labels[:, 1:] != NO_LOSS).any(dim=1)
    if empty.any():
        raise InputError(
            f"{int(empty.sum())} of {len(data)} training windows have no token to learn from (first: window "
            f"{int(empty.nonzero()[0])}); drop them, or raise the sequence length so that the answers fit"
        )
    if val is not None and not val.loss_tokens:
        raise InputError(f"the {len(val)} validation windows have no token to measure the loss of; use other data")


def _check_token_ids(vocabulary: int, *parts: TokenWindows | None) -> None:
    for windows in parts:
        if windows is None:
            continue
        low, high = (int(bound) for bound in windows.input_ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise InputError(
                f"token ids span {low}..{high}; the model knows 0..{vocabulary - 1}: tokenize with its own tokenizer"
            )
