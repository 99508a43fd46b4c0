"""What a run will do and where: everything that can be refused before any work begins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch

from formats import history
from formats.checkpoint import CheckpointWriter
from formats.errors import InputError
from formats.model import open_checkpoint
from formats.sizes import parse_size
from formats.types import QuantScheme

from ..block_ap import check_block_ap
from ..config import resolve_config
from ..demo import DEMO_PROMPT, demo_folder, demo_text
from ..e2e_qat import check_e2e_qat
from ..models.loading import build_skeleton, load_config, resolve_model
from ..options import TrainConfig
from ..resume.stage import recorded_output
from .run_files import is_demo_output
from .stage_settings import block_ap_settings, e2e_settings, qat_settings

__all__ = ["TrainPlan", "make_plan"]

OUTPUT_ROOT = Path("eqat-out")


@dataclass(frozen=True)
class TrainPlan:
    """A run, resolved.

    Attributes:
        config: settings with nothing left open.
        saved: the same settings as they are saved: the demo's own files stay unnamed, so that they are found again.
        demo: the demo model is trained.
        model: folder of the model.
        blocks: decoder blocks it has.
        out: the checkpoint to make.
        keep_block_ap: where Block-AP's checkpoint stays when E2E-QP follows; None to drop it.
        work: temporary folder.
        shard_size: bytes.
        force: replace existing outputs.
        notes: what the user should know before it starts.
    """

    config: TrainConfig
    saved: TrainConfig
    demo: bool
    model: Path
    blocks: int
    out: Path
    keep_block_ap: Path | None
    work: Path
    shard_size: int
    force: bool
    notes: tuple[str, ...]


def make_plan(config: TrainConfig, *, fitting: bool = True) -> TrainPlan:
    """Resolves the model, the settings and the outputs.

    Args:
        config: the user's.
        fitting: refuse what does not fit on this machine's GPUs.

    Raises:
        InputError: a model, a stage or settings that do not go together.
        OutputExistsError: an output exists and is not to be replaced.
    """
    demo = config.model is None
    if demo and config.stage == "e2e-qp":
        raise InputError("--stage e2e-qp starts from a finished native or GPTQ checkpoint; give its folder as MODEL")
    model = demo_folder() if demo else resolve_model(str(config.model), trust_remote_code=config.trust_remote_code)
    scheme, scale_dtype = _start(model, config.stage)
    architecture = load_config(model, trust_remote_code=config.trust_remote_code).get_text_config()
    context = getattr(architecture, "max_position_embeddings", None)
    saved, found = resolve_config(config, context=context, scheme=scheme, scale_dtype=scale_dtype)
    if saved.stage == "e2e-qp":
        build_skeleton(model, torch.float32, trust_remote_code=config.trust_remote_code)  # refuses what it cannot build
    elif saved.stage == "e2e-qat":
        check_e2e_qat(model, qat_settings(saved), fitting=fitting, trust_remote_code=config.trust_remote_code)
    else:
        check_block_ap(model, block_ap_settings(saved), trust_remote_code=config.trust_remote_code)
    if saved.stage in ("all", "e2e-qp"):
        e2e_settings(saved)  # refuses values that do not go together
    out = Path(saved.out) if saved.out is not None else _default_output(saved, model, demo)
    keep = Path(saved.keep_block_ap) if saved.keep_block_ap is not None and saved.stage == "all" else None
    notes = list(found)
    replace_demo = demo and saved.out is None and is_demo_output(out)
    if replace_demo and not saved.force:
        notes.append(f"replacing the previous demo in {out}")
    force = saved.force or replace_demo
    shard_size = parse_size(saved.shard_size)
    work = Path(saved.work) if saved.work is not None else out.with_name(f"{out.name}.work")
    _check_places({"MODEL": model, "--out": out, "--keep-block-ap": keep, "--work": work})
    _check_writable({"--out": out, "--keep-block-ap": keep, "--work": work})
    for place in (out, keep):
        if place is not None and not (recorded_output(work, place) and not saved.restart):
            CheckpointWriter(place, shard_size=shard_size, force=force)  # refuses what it may not replace
    running = saved
    if demo:
        notes.insert(0, f"no MODEL given: the demo model ({_size(model):.0f} MB) and text that ship with eqat")
        running = replace(
            saved,
            data=saved.data or str(demo_text("calibration")),
            eval_data=saved.eval_data or str(demo_text("heldout")),
            prompt=saved.prompt or DEMO_PROMPT,
        )
    saved = replace(saved, out=str(out))
    return TrainPlan(
        config=running,
        saved=saved,
        demo=demo,
        model=model,
        blocks=architecture.num_hidden_layers,
        out=out,
        keep_block_ap=keep,
        work=work,
        shard_size=shard_size,
        force=force,
        notes=tuple(notes),
    )


def _start(model: Path, stage: str) -> tuple[QuantScheme | None, str]:
    """Scheme of the checkpoint that a run starts from, None in full precision, and the dtype of scales it leads to."""
    with open_checkpoint(model) as checkpoint:
        scheme, fmt = checkpoint.scheme, checkpoint.format
        scales = checkpoint.layer(checkpoint.layer_names[0]).scales.dtype if checkpoint.layer_names else torch.float16
    if scheme is None and stage == "e2e-qp":
        raise InputError(
            f"{model} is in full precision; --stage e2e-qp starts from a finished native or GPTQ checkpoint "
            "(eqat train without --stage runs both stages)"
        )
    if scheme is not None and fmt is not None and stage != "e2e-qp":
        raise InputError(
            f"{model} is already quantized ({fmt.id}, {scheme}); training its weights starts from full precision: "
            "give the original model, or train its scales with --stage e2e-qp"
        )
    return scheme, str(scales).removeprefix("torch.")


def _default_output(config: TrainConfig, model: Path, demo: bool) -> Path:
    name = "demo" if demo else Path(str(config.model)).name or model.resolve().name
    if name in (".", ".."):
        name = model.resolve().name
    if config.stage == "e2e-qp":
        return OUTPUT_ROOT / f"{name}-e2e-qp"
    ending = "-block-ap" if config.stage == "block-ap" else ""
    return OUTPUT_ROOT / f"{name}-w{config.bits}g{config.group}{ending}"


def _check_places(places: Mapping[str, Path | None]) -> None:
    """Folders that a run replaces or removes as a whole hold none of the others; only MODEL may hold outputs."""
    resolved = {name: place.resolve() for name, place in places.items() if place is not None}
    for (first, one), (second, other) in combinations(resolved.items(), 2):
        if one == other:
            raise InputError(f"{second} and {first} are the same folder {one}; give {second} another one")
        for (inner, inside), (outer, outside) in (((first, one), (second, other)), ((second, other), (first, one))):
            if outer != "MODEL" and inside.is_relative_to(outside):
                raise InputError(f"{inner} {inside} lies in {outer} {outside}; give folders beside each other")


def _check_writable(places: Mapping[str, Path | None]) -> None:
    """Refuses folders that cannot be made, before hours of work; so does a working directory without a history."""
    for name, place in places.items():
        if place is not None and (parent := _unwritable(place)):
            raise InputError(f"{name} {place}: {parent} is read-only here; choose another {name}")
    if parent := _unwritable(history.HISTORY_FILE):
        raise InputError(f"{parent}, where eqat notes what was made, is read-only here; start it in another folder")


def _unwritable(place: Path) -> Path | None:
    """The nearest folder above a place if nothing can be made in it."""
    parent = next(folder for folder in place.absolute().parents if folder.exists())
    return None if os.access(parent, os.W_OK | os.X_OK) else parent


def _size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
