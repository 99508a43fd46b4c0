"""E2E-QAT: end-to-end quantization-aware training from a full-precision model.

Every quantized linear computes with the weight that would be stored now; the rounding is straight-through (learned step
sizes as in LSQ, arXiv 1902.08153, zero-points as in LSQ+, arXiv 2004.09576). Weights, scales, zero-points, norms and
biases are trained together against the full-precision model's predictions (knowledge distillation, arXiv 1503.02531),
by AdamW with linear warm-up and cosine decay to zero. What is written are codes, zero-points and 16-bit scales, as
after Block-AP: the checkpoint computes what training computed.

It holds the whole model with its optimizer, 16 bytes a trained weight and the teacher beside it, where Block-AP holds a
block. Several ranks share them by rows (:mod:`.row_linear`), and each step's windows.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from formats import get_format
from formats.checkpoint import CheckpointReader, CheckpointWriter

from ..data import TokenWindows
from ..end_to_end.checks import check_targets, check_token_ids
from ..end_to_end.shares import check_batch
from ..end_to_end.stage import finished_report, stage_identity
from ..end_to_end.state import E2eState
from ..hardware import peak_memory
from ..models.experts import check_experts
from ..models.loading import build_skeleton, check_names, load_dense_model
from ..models.targets import Targets, check_linear, find_targets, refuse_quantized
from ..overrides import describe_overrides
from ..ranks.group import count_of_ranks, joined, largest, size, together
from ..ranks.orders import give_order
from ..reporting.progress import Reporter
from ..resume.identity import tensor_fingerprint
from ..resume.stage import StageRecord
from .latent_model import LatentModel, build_latent_model
from .memory import check_memory, shares_teacher
from .row_model import load_row_model, names_in_rows
from .settings import QatReport, QatSettings
from .trainer import QatTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "QatReport",
    "QatSettings",
    "check_e2e_qat",
    "find_qat_targets",
    "qat_identity",
    "run_e2e_qat",
    "train_latent",
]


def check_e2e_qat(
    model_folder: Path, settings: QatSettings, *, fitting: bool = True, trust_remote_code: bool = False
) -> None:
    """Refuses a model or a scheme that ``run_e2e_qat`` would refuse, in seconds and before any data is needed.

    Args:
        model_folder: full-precision model.
        settings: see :class:`QatSettings`.
        fitting: whether it has to fit on the GPUs.
        trust_remote_code: allow Python files of the folder to run.

    Raises:
        InputError: the model has no decoder blocks, is quantized already, or does not fit on the GPU.
        UnsupportedSchemeError: the scheme does not fit a layer; the text names it and what works.
        CheckpointError: the model folder is damaged, or its tensors are not those of the architecture.
    """
    with CheckpointReader(model_folder) as reader:
        find_qat_targets(reader, settings, trust_remote_code, fitting=fitting)


def run_e2e_qat(
    model_folder: Path,
    data: TokenWindows,
    settings: QatSettings,
    out: Path,
    *,
    val: TokenWindows | None = None,
    work_dir: Path,
    reporter: Reporter,
    shard_size: int = 5 * 2**30,
    force: bool = False,
    trust_remote_code: bool = False,
) -> QatReport:
    """Trains a quantized model end to end and writes it as a native checkpoint.

    Args:
        model_folder: full-precision model with safetensors, configuration and tokenizer.
        data: training windows.
        settings: see :class:`QatSettings`.
        out: folder to write; it appears when training has finished, and not at all if it fails.
        val: windows whose next-token loss is measured before and after.
        work_dir: folder for the state of the training, saved every few minutes and when it is interrupted. A run that
            stopped goes on from it when everything that it depends on is as it was.
        reporter: told of progress.
        shard_size: bytes a weight file.
        force: replace an existing ``out``.
        trust_remote_code: allow Python files of the folder to run.

    Raises:
        InputError: data or a model that cannot be trained, or not those of the run in ``work_dir``.
        UnsupportedSchemeError: the scheme does not fit a layer.
        OutputExistsError: ``out`` exists and ``force`` is off.
        TrainingDivergedError: a loss, gradient or parameter became NaN or infinite.
    """
    start = time.perf_counter()
    check_targets(data, val)
    device = settings.resolved_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    work_dir.mkdir(parents=True, exist_ok=True)
    identity = qat_identity(model_folder, data, val, settings)
    record = StageRecord(work_dir / "e2e-qat.written.json", identity)
    if (finished := finished_report(record, out, QatReport, "E2E-QAT", reporter)) is not None:
        return finished
    with (
        CheckpointReader(model_folder) as reader,
        CheckpointWriter(out, shard_size=shard_size, force=force) as writer,
    ):
        targets = find_qat_targets(reader, settings, trust_remote_code)
        if told := describe_overrides(targets.schemes, settings.scheme):
            reporter.message(told)
        state = E2eState(work_dir / "e2e-qat", identity)
        if joined() is not None:
            windows = tensor_fingerprint(data.input_ids, data.labels)
            give_order("e2e-qat", windows=windows, state=str(state.folder.absolute()))
        with together():
            trained = train_latent(reader, targets, data, val, settings, state, reporter, trust_remote_code)
            report = replace(trained.report, seconds=time.perf_counter() - start)
            reporter.event("qat_codes", weights=report.weights, changed=report.codes_changed, peak=report.peak_memory)
            record.begin(out, asdict(report))
            trained.latent.write(writer, reader, targets, settings.scheme)
    record.done(out, asdict(report))
    state.remove()
    return report


@dataclass(frozen=True)
class Trained:
    """What training leaves.

    Attributes:
        latent: the trained model.
        teacher: the full-precision one.
        report: but for the seconds.
    """

    latent: LatentModel
    teacher: PreTrainedModel
    report: QatReport


def train_latent(
    reader: CheckpointReader,
    targets: Targets,
    data: TokenWindows,
    val: TokenWindows | None,
    settings: QatSettings,
    state: E2eState,
    reporter: Reporter,
    trust_remote_code: bool,
) -> Trained:
    """What every rank does: loads the models, trains and measures."""
    check_batch(settings.batch_size)
    torch.manual_seed(settings.seed)
    device, dtype = settings.resolved_device(), settings.resolved_compute_dtype()
    dense = _load(reader, targets, torch.float32, device, trust_remote_code, shared=size() > 1, head=True)
    check_token_ids(dense.get_input_embeddings().get_parameter("weight").shape[0], data, val)
    latent = build_latent_model(dense, reader, targets, settings, data)
    before = latent.codes()
    shared = shares_teacher(latent, settings)
    if shared:
        reporter.message("E2E-QAT: each rank holds its share of the full-precision model's weights too")
    teacher = _load(reader, targets, dtype, device, trust_remote_code, shared=shared, head=False)
    teacher.requires_grad_(False)
    trainer = QatTrainer(latent, teacher, settings, data.seq_len, reporter, state)
    trainer.train(data, val)
    after = None if val is None else trainer.validate(val, "after")
    codes = latent.codes()
    weights = count_of_ranks(sum(code.numel() for code in codes.values()))
    changed = count_of_ranks(sum(int((codes[name] != code).sum()) for name, code in before.items()))
    report = QatReport(
        losses=tuple(trainer.losses),
        grad_norms=tuple(trainer.grad_norms),
        val_loss_before=trainer.val_loss_before,
        val_loss_after=after,
        weights=weights,
        codes_changed=changed / weights,
        tokens=data.input_ids.numel() * settings.epochs,
        seconds=0.0,
        peak_memory=largest(peak_memory(device)),
    )
    return Trained(latent, teacher, report)


def _load(
    reader: CheckpointReader,
    targets: Targets,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    *,
    shared: bool,
    head: bool,
) -> PreTrainedModel:
    """The full-precision model, of several ranks in shares; ``head``: a head that is quantized too."""
    if not shared:
        return load_dense_model(reader.folder, dtype, device, trust_remote_code=trust_remote_code)
    return load_row_model(reader, names_in_rows(targets, head=head), dtype, device, trust_remote_code=trust_remote_code)


def qat_identity(
    model_folder: Path, data: TokenWindows, val: TokenWindows | None, settings: QatSettings
) -> dict[str, Any]:
    """What the trained parameters depend on."""
    return stage_identity("the model", model_folder, data, val, settings, without=("share_weights",))


def find_qat_targets(
    reader: CheckpointReader, settings: QatSettings, trust_remote_code: bool, *, fitting: bool = True
) -> Targets:
    """The layers to train; refuses what would fail later."""
    refuse_quantized(reader, "E2E-QAT")
    model = build_skeleton(reader.folder, torch.float32, trust_remote_code=trust_remote_code)
    check_names(model, reader.tensors, reader.folder)
    targets = find_targets(model, reader, settings.scheme, settings.overrides)
    for index, layer in enumerate(targets.layers):
        check_experts(layer, f"{targets.path}.{index}")
    weights = 0
    for name, scheme in targets.schemes.items():
        if scheme is not None:
            linear = model.get_submodule(name)
            check_linear(name, linear, scheme, get_format("native"))
            weights += linear.get_parameter("weight").numel()
    if fitting:
        check_memory(weights, sum(p.numel() for p in model.parameters()), settings)
    return targets
