"""Rows of the closing table, kept as they are measured, so that a resumed run need not measure them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..resume.durable import read_json, write_json
from .results import ModelResult

__all__ = ["MeasuredRows"]


class MeasuredRows:
    """Rows by title, on disk.

    Args:
        file: JSON; rows that were measured with something else are dropped.
        measured_with: what the rows depend on besides the model, as JSON values.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, file: Path, measured_with: Mapping[str, Any]) -> None:
        self._file, self._with = file, dict(measured_with)
        kept = read_json(file) or {}
        self._rows: dict[str, dict[str, Any]] = kept["rows"] if kept.get("measured_with") == self._with else {}

    def get(self, title: str) -> ModelResult | None:
        """A row that was measured before."""
        return ModelResult(**self._rows[title]) if title in self._rows else None

    def add(self, row: ModelResult) -> None:
        """Keeps a row.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self._rows[row.model] = asdict(row)
        write_json(self._file, {"measured_with": self._with, "rows": self._rows})
