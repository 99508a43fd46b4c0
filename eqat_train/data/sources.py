"""Where data comes from: a local file or a ``datasets`` id, as rows with named columns.

A source is text when it has a ``text`` column (plain text files do), and instructions when it has ``messages`` or both
``instruction`` and ``output`` columns. A file can be both; the reader of the source chooses.

``datasets`` ids are written ``name``, ``name:config`` or ``name:config:split``; the config may be empty
(``name::validation``). A local folder of data files is a ``datasets`` id too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import InputError

from .hub_datasets import open_dataset
from .row_files import jsonl_columns, jsonl_rows, parquet_columns, parquet_rows
from .text_files import iterate_documents

__all__ = ["DataSource", "open_source"]

SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz", ".parquet")


@dataclass(frozen=True)
class DataSource:
    """Rows with named columns.

    Attributes:
        name: what the user wrote.
        columns: column names.
        fingerprint: hash of the content.
        rows: starts a fresh pass over the rows.
    """

    name: str
    columns: tuple[str, ...]
    fingerprint: str
    rows: Callable[[], Iterable[Mapping[str, Any]]]

    @property
    def has_text(self) -> bool:
        """True when there is a ``text`` column."""
        return "text" in self.columns

    @property
    def has_instructions(self) -> bool:
        """True when there are conversations or instruction and output columns."""
        return "messages" in self.columns or {"instruction", "output"} <= set(self.columns)

    def texts(self) -> Iterator[str]:
        """The ``text`` column; empty texts are skipped.

        Raises:
            InputError: there is no such column, or a row's text is not a string.
        """
        if not self.has_text:
            raise InputError(f"{self.name} has no text column; it has {', '.join(self.columns)}")
        for number, row in enumerate(self.rows(), 1):
            text = row.get("text")
            if not isinstance(text, str):
                raise InputError(f"{self.name} row {number}: text is {type(text).__name__}; expected a string")
            if text:
                yield text


def open_source(spec: str, default_split: str = "train") -> DataSource:
    """Opens a local file, or a dataset by its id.

    Args:
        spec: path of a ``.txt``, ``.jsonl`` (either also ``.xz``) or ``.parquet`` file, or ``name[:config[:split]]``.
        default_split: split of a dataset whose id names none.

    Raises:
        InputError: it does not exist, cannot be read, or has no column eqat knows.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        source = _open_file(spec, path)
    elif path.name.endswith(SUFFIXES):
        raise InputError(f"data file {spec} does not exist (working directory: {Path.cwd()})")
    else:
        source = DataSource(spec, *open_dataset(spec, default_split))
    if not source.has_text and not source.has_instructions:
        raise InputError(
            f"{spec} has the columns {', '.join(source.columns)}; "
            "needed are text, messages, or instruction and output (input is optional)"
        )
    return source


def _open_file(spec: str, path: Path) -> DataSource:
    if path.name.endswith((".txt", ".txt.xz")):
        return DataSource(spec, ("text",), _content_hash(path), lambda: ({"text": d} for d in iterate_documents(path)))
    if path.name.endswith((".jsonl", ".jsonl.xz")):
        return DataSource(spec, jsonl_columns(path), _content_hash(path), lambda: jsonl_rows(path))
    if path.name.endswith(".parquet"):
        return DataSource(spec, parquet_columns(path), _content_hash(path), lambda: parquet_rows(path))
    raise InputError(f"data file {spec} has an unknown ending; known are {', '.join(SUFFIXES)}")


def _content_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
