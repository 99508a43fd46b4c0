"""What a run leaves beside its weights: resolved settings, log, and a report for machines."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from formats.errors import CheckpointError
from formats.version import __version__

from ..reporting.reporters import json_values

__all__ = ["CONFIG_FILE", "LOG_FILE", "REPORT_FILE", "is_demo_output", "publish", "write_report"]

CONFIG_FILE = "eqat_config.yaml"
LOG_FILE = "train.log"
REPORT_FILE = "training_report.json"


def write_report(
    file: Path,
    *,
    demo: bool,
    settings: dict[str, Any],
    device: torch.device,
    seconds: float,
    results: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
) -> None:
    """Writes everything measured in a run, with the versions it was measured with, as JSON."""
    report = {
        "eqat": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "demo": demo,
        "seconds": seconds,
        "settings": json_values(settings),
        "results": [json_values(result) for result in results],
        "events": list(events),
    }
    file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def publish(files: Sequence[Path], out: Path) -> None:
    """Moves files into a finished checkpoint, replacing those of the same name.

    Raises:
        CheckpointError: a file cannot be written there.
    """
    for file in files:
        try:
            shutil.move(file, out / file.name)
        except OSError as error:
            raise CheckpointError(
                f"{out} is complete, but {file.name} cannot be written into it: {error.strerror or error}"
            ) from error


def is_demo_output(folder: Path) -> bool:
    """True for a checkpoint that the demo made, which the next demo may replace: its settings name no model."""
    try:
        settings = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and "model" in settings and settings["model"] is None
