"""What an unfinished run of Block-AP was started with, and what it had finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..resume.identity import folder_fingerprint, settings_identity, tensor_fingerprint
from .block_files import Blocks
from .settings import BlockApReport, BlockApSettings, BlockReport

__all__ = ["block_ap_identity", "block_report", "going_on", "report_from"]


def block_ap_identity(model_folder: Path, train: Tensor, val: Tensor, settings: BlockApSettings) -> dict[str, Any]:
    """What the blocks depend on. Where hidden states are kept changes nothing."""
    return {
        "settings": settings_identity(settings, without=("activations", "device", "compute_dtype"))
        | {"device": settings.resolved_device().type, "dtype": str(settings.resolved_compute_dtype())},
        "the model's weights": folder_fingerprint(model_folder),
        "the training windows": tensor_fingerprint(train),
        "the validation windows": tensor_fingerprint(val),
    }


def report_from(values: dict[str, Any]) -> BlockApReport:
    """A run's report from its JSON values."""
    return BlockApReport(**{**values, "blocks": tuple(block_report(block) for block in values["blocks"])})


def block_report(values: dict[str, Any]) -> BlockReport:
    """A block's report from its JSON values."""
    losses = {name: tuple(values[name]) for name in ("train_losses", "val_losses")}
    return BlockReport(**{**values, **losses})


def going_on(done: int, count: int, files: Blocks) -> str:
    """What to say of a run that goes on."""
    text = f"going on with an unfinished run: {done} of {count} blocks are finished in {files.folder}"
    if files.damaged is None:
        return text
    return f"{text}; block {files.damaged} is damaged there (checksum), training goes on from it"
