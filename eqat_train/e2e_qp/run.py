"""E2E-QP: end-to-end training of quantization parameters (EfficientQAT, arXiv 2407.11062, section 3.3).

Packed codes and zero-points stay as they are; every scale of the model is trained by next-token cross-entropy with
AdamW, linear warm-up and cosine decay to zero, clipped by global norm. The model computes with its packed weights and
with scales rounded to the stored dtype, so the checkpoint that is written computes what training computed.

On labels: they are not shifted, and -100 marks tokens without loss. The loss of an optimizer step is the mean over
the target tokens of its whole batch, however it is cut into micro-batches.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from formats.checkpoint import CheckpointWriter
from formats.model import Checkpoint, open_checkpoint

from ..data import TokenWindows
from ..end_to_end.checks import check_targets, check_token_ids
from ..end_to_end.shares import check_batch
from ..end_to_end.stage import finished_report, stage_identity
from ..end_to_end.state import E2eState
from ..hardware import peak_memory
from ..ranks.group import joined, largest, together
from ..ranks.orders import give_order
from ..reporting.progress import Reporter
from ..resume.identity import tensor_fingerprint
from ..resume.stage import StageRecord
from .packed_model import load_packed_model, write_trained
from .settings import E2eReport, E2eSettings
from .shared_words import shared_words
from .trainer import Trainer

__all__ = ["E2eReport", "E2eSettings", "e2e_identity", "run_e2e_qp", "train_scales"]


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
    check_targets(data, val)
    device = settings.resolved_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    work_dir.mkdir(parents=True, exist_ok=True)
    identity = e2e_identity(checkpoint, data, val, settings)
    record = StageRecord(work_dir / "e2e-qp.written.json", identity)
    if (finished := finished_report(record, out, E2eReport, "E2E-QP", reporter)) is not None:
        return finished
    with open_checkpoint(checkpoint) as source, CheckpointWriter(out, shard_size=shard_size, force=force) as writer:
        state = E2eState(work_dir / "e2e-qp", identity)
        if joined() is not None:
            windows = tensor_fingerprint(data.input_ids, data.labels)
            places = {"checkpoint": str(checkpoint.absolute()), "state": str(state.folder.absolute())}
            give_order("e2e-qp", windows=windows, **places)
        with together():
            trainer, after, peak = train_scales(source, data, val, settings, state, reporter, trust_remote_code)
        packed = trainer.packed
        report = E2eReport(
            losses=tuple(trainer.losses),
            grad_norms=tuple(trainer.grad_norms),
            val_loss_before=trainer.val_loss_before,
            val_loss_after=after,
            lr=trainer.lr,
            scales=sum(scale.numel() for scale in packed.scales),
            tokens=data.input_ids.numel() * settings.epochs,
            seconds=time.perf_counter() - start,
            peak_memory=peak,
            memory=trainer.memory(),
        )
        if report.memory:
            reporter.event("e2e_memory", peak=report.peak_memory, **report.memory)
        record.begin(out, asdict(report))
        write_trained(writer, source, packed.linears)
    record.done(out, asdict(report))
    state.remove()
    return report


def train_scales(
    source: Checkpoint,
    data: TokenWindows,
    val: TokenWindows | None,
    settings: E2eSettings,
    state: E2eState,
    reporter: Reporter,
    trust_remote_code: bool,
) -> tuple[Trainer, float | None, int]:
    """What every rank does: loads the model, trains its scales and measures.

    Returns:
        The trainer with the trained model, the validation loss, and the largest peak memory of a rank.
    """
    check_batch(settings.batch_size)
    words = shared_words(source, settings)
    if words is not None:
        reporter.message("E2E-QP: each rank holds its share of the packed weights")
    packed = load_packed_model(
        source,
        scale_dtype=settings.scale_dtype,
        compute_dtype=settings.resolved_compute_dtype(),
        device=settings.resolved_device(),
        trust_remote_code=trust_remote_code,
        words=words,
    )
    check_token_ids(packed.vocabulary, data, val)
    trainer = Trainer(packed, settings, data.seq_len, reporter, state)
    trainer.train(data, val)
    after = None if val is None else trainer.validate(val, "after")
    return trainer, after, largest(peak_memory(settings.resolved_device()))


def e2e_identity(
    checkpoint: Path, data: TokenWindows, val: TokenWindows | None, settings: E2eSettings
) -> dict[str, Any]:
    """What the trained scales depend on."""
    return stage_identity("the checkpoint", checkpoint, data, val, settings, without=("share_weights",))
