"""How an end-to-end stage begins: what its result depends on, and the report of one that is finished already."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from ..data import TokenWindows
from ..reporting.progress import Reporter
from ..resume.identity import folder_fingerprint, settings_identity, tensor_fingerprint
from ..resume.stage import StageRecord
from .settings import EndToEndSettings

__all__ = ["finished_report", "stage_identity"]

Report = TypeVar("Report")


def stage_identity(
    source: str,
    folder: Path,
    data: TokenWindows,
    val: TokenWindows | None,
    settings: EndToEndSettings,
    *,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """What the trained parameters depend on.

    Args:
        source: what messages call the folder, e.g. ``the model``.
        folder: training starts from its weights.
        data: training windows.
        val: validation windows.
        settings: of the stage.
        without: further settings that do not change the result.
    """
    return {
        "settings": settings_identity(settings, without=("device", "compute_dtype", *without))
        | {"device": settings.resolved_device().type, "dtype": str(settings.resolved_compute_dtype())},
        f"{source}'s weights": folder_fingerprint(folder),
        "the training windows": tensor_fingerprint(data.input_ids, data.labels),
        "the validation windows": None if val is None else tensor_fingerprint(val.input_ids, val.labels),
    }


def finished_report(
    record: StageRecord, out: Path, kind: type[Report], stage: str, reporter: Reporter
) -> Report | None:
    """The report of a stage whose checkpoint is there; None where it has to be made.

    Raises:
        InputError: the checkpoint is of a stage that was started with something else.
        CheckpointError: the note is damaged.
    """
    written = record.written(out)
    if written is None:
        return None
    reporter.message(f"{stage}'s checkpoint is finished: {out}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in written.items()})
