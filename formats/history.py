"""What was made in this working directory: ``.eqat/history.json``.

A list of records, oldest first: ``{"kind": "native" | "export", "path": ..., "time": ..., further fields}``. Paths
below the working directory are stored relative to it, so that the directory can be moved. Commands without a
checkpoint argument read it; nothing else depends on it, and deleting it is harmless.
"""

from __future__ import annotations

import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .errors import InputError

__all__ = ["last_exports", "last_native", "record", "source_of"]

HISTORY_FILE = Path(".eqat") / "history.json"
KINDS = ("native", "export")
PATH_FIELDS = ("path", "source")


def record(kind: Literal["native", "export"], path: str | Path, **info: Any) -> None:
    """Appends one record.

    Args:
        kind: ``native`` for a checkpoint that training made, ``export`` for a conversion.
        path: the checkpoint folder.
        **info: further JSON values; ``source``, the checkpoint an export was made from, is a path.

    Raises:
        InputError: the kind is unknown, or the existing history cannot be read.
    """
    if kind not in KINDS:
        raise InputError(f"history kind {kind!r} is unknown; allowed are {', '.join(KINDS)}")
    entry = {"kind": kind, "path": path, "time": datetime.now(UTC).isoformat(timespec="seconds"), **info}
    for field in PATH_FIELDS:
        if entry.get(field) is not None:
            entry[field] = _stored(Path(entry[field]))
    _write([*_entries(), entry])


def last_native() -> Path | None:
    """The newest checkpoint that training made here and that still exists."""
    made = [entry["path"] for entry in _entries() if entry["kind"] == "native"]
    return next((Path(path) for path in reversed(made) if Path(path).is_dir()), None)


def last_exports() -> list[Path]:
    """Exports of the newest native checkpoint, made since it was written, oldest first.

    Where nothing was trained here, the exports of the checkpoint that was exported last.
    """
    entries = [entry for entry in _entries() if Path(entry["path"]).is_dir()]
    source = next((entry["path"] for entry in reversed(entries) if entry["kind"] == "native"), None)
    if source is None:
        source = next((entry.get("source") for entry in reversed(entries)), None)
    paths: dict[str, None] = {}
    for entry in entries:
        if entry["kind"] == "native" and entry["path"] == source:
            paths.clear()  # written anew: earlier exports hold something else
        elif entry["kind"] == "export" and source is not None:
            paths.pop(entry["path"], None)  # a path exported again counts once, by its newest source
            if entry.get("source") == source:
                paths[entry["path"]] = None
    return [Path(path) for path in paths]


def source_of(path: str | Path) -> Path | None:
    """The checkpoint that an export was made from, when it is known and still exists."""
    stored = _stored(Path(path))
    for entry in reversed(_entries()):
        if entry["kind"] == "export" and entry["path"] == stored:
            source = entry.get("source")
            return Path(source) if source is not None and Path(source).is_dir() else None
    return None


def _stored(path: Path) -> str:
    absolute = path.resolve()
    here = Path.cwd().resolve()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def _entries() -> list[dict[str, Any]]:
    try:
        text = HISTORY_FILE.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    try:
        entries = json.loads(text)["records"]
        valid = all(entry["kind"] in KINDS and isinstance(entry["path"], str) for entry in entries)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{HISTORY_FILE} cannot be read ({error}); delete it and name checkpoints yourself") from error
    if not valid:
        raise InputError(f"{HISTORY_FILE} holds a record that is not eqat's; delete it and name checkpoints yourself")
    return entries


def _write(entries: list[dict[str, Any]]) -> None:
    HISTORY_FILE.parent.mkdir(exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=HISTORY_FILE.parent, prefix="history-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({"records": entries}, stream, indent=1)
        os.replace(temporary, HISTORY_FILE)
    except BaseException:
        os.unlink(temporary)
        raise
