"""``eqat train --dry-run``: what a run would take, from a few real steps of one block and the formulae of ``costs``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from formats.errors import InputError
from formats.model import open_checkpoint

from ..block_ap.activations import choose_place
from ..block_ap.rehearsal import Rehearsal, rehearse
from ..costs.estimate import PROCESS_BYTES, Work, block_bytes, cpu_bytes, disk, e2e_bytes, qat_bytes
from ..costs.shapes import ModelShape, block_shape
from ..data import open_source
from ..e2e_qat import check_e2e_qat
from ..e2e_qp.trainer import ACTIVATION_BUDGET, FREE_SHARE, MICRO_TOKENS
from ..models.decoder import find_decoder_layers
from ..models.loading import build_skeleton
from ..options import TrainConfig
from ..reporting.progress import Reporter
from .plan import TrainPlan, make_plan
from .stage_settings import block_ap_settings, compute_target, qat_settings

__all__ = ["dry_run"]


@dataclass(frozen=True)
class _Row:
    """A line of the plan: bytes or seconds, and where they come from."""

    part: str
    what: str
    detail: str
    bytes: int | None = None
    seconds: float | None = None


def dry_run(config: TrainConfig, reporter: Reporter) -> None:
    """Tells what a run would take, as a ``plan`` event; writes nothing.

    Raises:
        EqatError: what the run itself would refuse at its start.
    """
    plan = make_plan(config, fitting=False)
    for note in plan.notes:
        reporter.message(note)
    for data in (plan.config.data, plan.config.e2e_data, plan.config.eval_data):
        if data is not None:
            open_source(data)  # refuses a file that is not there
    shape, stored = _shape(plan)
    work = _work(plan.config, shape, stored)
    rows, problems = _memory(plan, shape, work), _refused(plan)
    place = "none"
    if work.epochs:
        try:
            place, row = _activations(plan, shape, work)
            rows.append(row)
        except InputError as error:
            problems.append(str(error))
    rows += _disk(plan, shape, work, on_disk=place == "disk")
    measured = None
    if plan.config.stage in ("all", "block-ap"):
        measured = rehearse(
            plan.model,
            block_ap_settings(plan.config),
            work.seq_len,
            (work.e2e_micro_batch, work.e2e_seq_len) if work.e2e_samples else None,
            reporter,
            recomputed=_recomputes(plan, shape, work),
            trust_remote_code=plan.config.trust_remote_code,
        )
    rows += _time(plan, shape, work, measured)
    free = shutil.disk_usage(_existing(plan.work)).free
    if (needed := next(row.bytes or 0 for row in rows if row.what == "at the most")) > free:
        problems.append(f"the disk of {plan.work} has {free / 2**30:.1f} GiB free; give --work and --out a larger one")
    device, _ = compute_target(plan.config)
    reporter.event(
        "plan",
        model=str(plan.model),
        out=str(plan.out),
        work=str(plan.work),
        blocks=len(shape.blocks),
        parameters=shape.parameters,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        disk_free=free,
        disk_needed=needed,
        activations=place,
        rows=[vars(row) for row in rows],
        problems=problems,
    )


def _refused(plan: TrainPlan) -> list[str]:
    """Why this machine's GPU cannot hold what the plan needs; empty where it can."""
    if plan.config.stage != "e2e-qat":
        return []
    trust = plan.config.trust_remote_code
    try:
        check_e2e_qat(plan.model, qat_settings(plan.config), trust_remote_code=trust)
    except InputError as error:
        return [str(error)]
    return []


def _shape(plan: TrainPlan) -> tuple[ModelShape, tuple[int, int] | None]:
    """The model's sizes, and bits and group size where it is quantized already."""
    model = build_skeleton(plan.model, torch.float32, trust_remote_code=plan.config.trust_remote_code)
    _, layers = find_decoder_layers(model)
    blocks = tuple(block_shape(layer) for layer in layers)
    text, head = model.config.get_text_config(), model.get_output_embeddings()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = ModelShape(
        name=plan.model.name,
        blocks=blocks,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        outside=parameters - sum(block.parameters for block in blocks),
        head=sum(parameter.numel() for parameter in head.parameters()) if head is not None else 0,
    )
    with open_checkpoint(plan.model) as checkpoint:
        scheme = checkpoint.scheme
        return shape, None if scheme is None else (scheme.bits, scheme.group_size)


def _work(config: TrainConfig, shape: ModelShape, stored: tuple[int, int] | None) -> Work:
    bits, group = stored or (config.bits or 0, config.group or 0)
    both, device = config.stage == "all", compute_target(config)[0]
    tokens = 1 if device.type == "cuda" else MICRO_TOKENS["cpu"]  # on a GPU one window is the least that has to fit
    block_ap, e2e = both or config.stage == "block-ap", config.stage != "block-ap"
    return Work(
        bits=bits,
        group_size=shape.hidden if group == -1 else group,
        samples=config.samples,
        validation=config.val_samples,
        seq_len=config.seq_len or 0,
        batch=min(config.batch, config.samples),
        epochs=config.epochs if block_ap else 0,
        activation_bytes=2 if config.activation_dtype in ("bfloat16", "float16") else 4,
        e2e_samples=config.e2e_samples if e2e else 0,
        e2e_seq_len=config.e2e_seq_len or 0,
        e2e_batch=config.e2e_batch,
        e2e_micro_batch=config.e2e_micro_batch or min(config.e2e_batch, max(1, tokens // (config.e2e_seq_len or 1))),
        e2e_epochs=config.e2e_epochs,
    )


def _recomputes(plan: TrainPlan, shape: ModelShape, work: Work) -> bool:
    device, dtype = compute_target(plan.config)
    budget = FREE_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else ACTIVATION_BUDGET
    tokens = work.e2e_micro_batch * work.e2e_seq_len
    return dtype.itemsize * tokens * sum(block.features for block in shape.blocks) > budget


def _memory(plan: TrainPlan, shape: ModelShape, work: Work) -> list[_Row]:
    device, dtype = compute_target(plan.config)
    on_gpu, largest, tokens = device.type == "cuda", shape.largest, work.batch * work.seq_len
    windows = 16 * (work.samples * work.seq_len * bool(work.epochs) + work.e2e_samples * work.e2e_seq_len)
    block = cpu_bytes(largest, tokens if work.epochs else 0, on_gpu=on_gpu)
    size = f"one block ({largest.parameters / 1e6:.0f}M)" if not on_gpu else "tensors on their way to the GPU"
    rows = []
    if plan.config.stage == "e2e-qat":
        return _qat_memory(plan, shape, on_gpu=on_gpu)
    if plan.config.stage != "e2e-qp":
        rows.append(_Row("memory", "Block-AP, CPU", f"{size}, libraries, windows", round(block + windows)))
        if on_gpu:
            detail = f"one block, {tokens:,} tokens a step"
            rows.append(_Row("memory", "Block-AP, GPU", detail, round(block_bytes(largest, tokens))))
    if work.e2e_samples:
        e2e = e2e_bytes(shape, work, element=dtype.itemsize)
        where, least = ("GPU", "; free memory saves recomputing") if on_gpu else ("CPU", "")
        if not on_gpu:
            kept = work.e2e_micro_batch * work.e2e_seq_len * sum(block.features for block in shape.blocks)
            e2e += PROCESS_BYTES + windows + min(ACTIVATION_BUDGET, dtype.itemsize * kept)
        rows.append(
            _Row("memory", f"E2E-QP, {where}", f"the whole packed model, {_windows(work)} a pass{least}", round(e2e))
        )
    return rows


def _qat_memory(plan: TrainPlan, shape: ModelShape, *, on_gpu: bool) -> list[_Row]:
    detail = "the whole model, its optimizer and a teacher; activations come on top"
    needed = qat_bytes(shape.parameters, shape.weights)
    rows = [_Row("memory", "E2E-QAT, GPU" if on_gpu else "E2E-QAT, CPU", detail, round(needed))]
    if on_gpu:
        share = plan.config.e2e_share != "off"
        for count in (2, 8):
            needed = qat_bytes(shape.parameters, shape.weights, ranks=count, share_teacher=share)
            detail = "under torchrun, with everything shared that ranks may share" if share else "under torchrun"
            rows.append(_Row("memory", f"each of {count} GPUs", detail, round(needed)))
    return rows


def _activations(plan: TrainPlan, shape: ModelShape, work: Work) -> tuple[str, _Row]:
    settings = block_ap_settings(plan.config)
    choice = choose_place(
        settings.activations,
        work.activations(shape.hidden),
        settings.resolved_device(),
        _existing(plan.work),
        reserved=round(block_bytes(shape.largest, work.batch * work.seq_len)),
        dtype=settings.resolved_activation_dtype(),
    )
    where = {"gpu": "on the GPU", "ram": "in RAM", "disk": "on disk"}[choice.place]
    detail = f"{where}: 2 streams of up to {work.samples + work.validation} windows"
    return choice.place, _Row("memory" if choice.place != "disk" else "disk", "activations", detail, choice.nbytes)


def _disk(plan: TrainPlan, shape: ModelShape, work: Work, *, on_disk: bool) -> list[_Row]:
    sizes = disk(shape, work, on_disk=on_disk)
    block_ap = plan.config.stage in ("all", "block-ap")
    rows = [_Row("disk", "finished blocks", "in the work folder", round(sizes.blocks))] if block_ap else []
    if sizes.block_ap:
        kept = plan.keep_block_ap or "in the work folder"
        rows.append(_Row("disk", "Block-AP's checkpoint", str(kept), round(sizes.block_ap)))
    if plan.config.stage == "e2e-qat":  # weights and both moments in fp32, new beside old
        sizes = replace(sizes, state=2 * 12 * shape.weights)
    if sizes.state:
        rows.append(_Row("disk", "the state to go on from", "new beside old, in the work folder", round(sizes.state)))
    rows.append(_Row("disk", "output", str(plan.out), round(sizes.output)))
    peak = sizes.peak if block_ap else replace(sizes, blocks=0).peak
    return [*rows, _Row("disk", "at the most", "at one time", round(peak))]


def _time(plan: TrainPlan, shape: ModelShape, work: Work, measured: Rehearsal | None) -> list[_Row]:
    if measured is None:
        stage = "E2E-QP" if plan.config.stage == "e2e-qp" else "E2E-QAT"
        return [_Row("time", stage, "not measured: the first steps of the run itself tell")]
    block, count = shape.blocks[measured.block], len(shape.blocks)
    blocks = sum(other.active for other in shape.blocks) / block.active  # as many of the measured one
    rows = []
    if work.epochs:
        steps = work.epochs * -(-work.samples // work.batch)
        tokens = (work.samples + work.validation) * work.seq_len
        training, passing = steps * measured.step_seconds, 2 * tokens * measured.pass_seconds
        detail = f"{count} blocks of {steps} steps of {_short(measured.step_seconds)} and {_short(passing)} of passes"
        rows.append(_Row("time", "Block-AP", detail, seconds=blocks * (training + passing)))
    if work.e2e_samples:
        tokens = work.e2e_epochs * work.e2e_samples * work.e2e_seq_len
        layers = blocks + 4 * shape.head / (8 * block.active)  # the head by its operations
        detail = f"{tokens:,} tokens, {_short(1e3 * measured.e2e_seconds)} per layer and 1000 tokens"
        rows.append(_Row("time", "E2E-QP", detail, seconds=tokens * layers * measured.e2e_seconds))
    return rows


def _windows(work: Work) -> str:
    return f"{work.e2e_micro_batch} window{'s' if work.e2e_micro_batch > 1 else ''}"


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
