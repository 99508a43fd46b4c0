"""One stage of an unfinished run on disk: what it was started with, and whether its checkpoint is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formats.errors import CheckpointError, InputError

from .durable import read_json, write_json
from .identity import differences

__all__ = ["StageFolder", "StageRecord", "recorded_output"]

IDENTITY_FILE = "started_with.json"


class StageFolder:
    """A folder for what a stage with these settings, weights and data has finished.

    Attributes:
        path: the folder; it is made by ``prepare``.

    Args:
        path: the folder.
        identity: see :mod:`eqat_train.resume.identity`.
        finished: pattern of a file that is there when something is finished.

    Raises:
        InputError: a stage that was started with something else has finished something there.
        CheckpointError: the folder is damaged.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], finished: str) -> None:
        self.path, self._identity = path, dict(identity)
        before = read_json(path / IDENTITY_FILE)
        self._ready = before is not None and any(path.glob(finished))
        if self._ready:
            _check_same(path, before, self._identity)

    def prepare(self) -> None:
        """Makes the folder anew, unless something is finished in it.

        Raises:
            CheckpointError: it cannot be made.
        """
        if self._ready:
            return
        self.remove()
        try:
            self.path.mkdir(parents=True)
        except OSError as exc:
            raise CheckpointError(f"cannot make {self.path}: {exc.strerror or exc}") from exc
        write_json(self.path / IDENTITY_FILE, self._identity)
        self._ready = True

    def remove(self) -> None:
        """Deletes the folder and what is in it."""
        if self.path.exists():
            shutil.rmtree(self.path)


class StageRecord:
    """Notes that a stage's checkpoint is about to be written, and that it is, so that it is not made twice.

    A checkpoint appears by a rename. Where nothing was there when writing began, whatever is there later is complete
    and this stage's own; where something was to be replaced, only the closing note tells.

    Args:
        file: the note.
        identity: what the stage was started with.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        self._file, self._identity = file, dict(identity)

    def written(self, out: Path) -> Any:
        """The stage's report when its checkpoint is there, else None.

        Raises:
            InputError: the checkpoint is of a stage that was started with something else.
            CheckpointError: the note is damaged.
        """
        note = read_json(self._file)
        if note is None or not _is_output(note, out):
            return None
        _check_same(self._file.parent, note["started_with"], self._identity)
        return note["report"]

    def begin(self, out: Path, report: Any) -> None:
        """To be called before ``out`` is written."""
        if not os.path.lexists(out):
            self._write(out, report)

    def done(self, out: Path, report: Any) -> None:
        """To be called when ``out`` is there."""
        self._write(out, report)

    def _write(self, out: Path, report: Any) -> None:
        write_json(self._file, {"out": str(out.absolute()), "report": report, "started_with": self._identity})


def recorded_output(work: Path, out: Path) -> bool:
    """Whether an unfinished run in a work folder has written ``out``."""
    return any(_is_output(read_json(file) or {}, out) for file in work.glob("*.written.json"))


def _is_output(note: Mapping[str, Any], out: Path) -> bool:
    return note.get("out") == str(out.absolute()) and out.exists()


def _check_same(where: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    found = differences(before, now)
    if found:
        raise InputError(
            f"the unfinished run in {where} was started with something else: {'; '.join(found)}; "
            "go on with what it was started with, or discard it with --restart"
        )
