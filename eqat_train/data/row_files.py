"""Files of rows with named columns: JSON Lines and Parquet, one batch of rows in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from formats.errors import InputError

from ..error_text import first_line
from .text_files import open_text

__all__ = ["jsonl_columns", "jsonl_rows", "parquet_columns", "parquet_rows"]

Row = dict[str, Any]


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Rows of a ``.jsonl`` or ``.jsonl.xz`` file; blank lines are skipped.

    Raises:
        InputError: a line is not a JSON object, or the file cannot be read.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path} line {number} is not JSON: {error.msg} at column {error.colno}; one object a line"
                ) from error
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} is a JSON {type(row).__name__}; each line must be an object")
            yield row


def jsonl_columns(path: Path) -> tuple[str, ...]:
    """Column names, from the first row."""
    for row in jsonl_rows(path):
        return tuple(row)
    raise InputError(f"{path} holds no rows")


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a ``.parquet`` file.

    Raises:
        InputError: the file is damaged or cannot be read.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path} as Parquet: {first_line(error)}") from error


def parquet_columns(path: Path) -> tuple[str, ...]:
    """Column names of the schema."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return tuple(file.schema_arrow.names)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path} as Parquet: {first_line(error)}") from error
