"""The folder beside an output that holds what a run needs while it runs, and what the next goes on from."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from formats.errors import InputError

__all__ = ["WorkFolder"]

MARKER = ".eqat-work"
# What a stage leaves when part of it is finished, and everything that the next run can use.
FINISHED = ("blocks/[0-9]*.json", "e2e-qp/state.json", "e2e-qat/state.json", "*.written.json")
RESUMABLE = (
    "blocks",
    "block-ap",
    "block-ap.written.json",
    "e2e-qp",
    "e2e-qp.written.json",
    "e2e-qat",
    "e2e-qat.written.json",
    "measured.json",
    "events.jsonl",
    "train.log",
)


class WorkFolder:
    """The folder; a context manager.

    It is removed when the run succeeds, and when it stops before it has finished anything. Otherwise it is kept, and
    the next run in the same place goes on from it. Of an earlier run only what can be gone on from is kept.

    Args:
        path: the folder; made with its parents.
        restart: discard what an earlier run left.

    Attributes:
        resumed: an earlier run has left something to go on from.

    Raises:
        InputError: the folder exists and is not eqat's, or another run is using it.
    """

    def __init__(self, path: Path, *, restart: bool = False) -> None:
        self.path = path.absolute()
        self.resumed = False
        self._restart = restart
        self._lock: IO[str] | None = None
        self._new_parents: list[Path] = []

    @property
    def worth_keeping(self) -> bool:
        """Whether something in it is finished."""
        return any(any(self.path.glob(pattern)) for pattern in FINISHED)

    def __enter__(self) -> WorkFolder:
        marker = self.path / MARKER
        if os.path.lexists(self.path) and not marker.is_file() and not self._empty():
            raise InputError(f"work folder {self.path} exists and is not eqat's; remove it or choose another --work")
        self._new_parents = [parent for parent in self.path.parents if not parent.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = marker.open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another eqat train is using {self.path}; wait for it or choose another --out") from error
        except OSError as error:
            raise InputError(f"cannot make the work folder {self.path}: {error.strerror or error}") from error
        self.resumed = self.worth_keeping and not self._restart
        for entry in self.path.iterdir():
            if entry != marker and not (self.resumed and entry.name in RESUMABLE):
                _remove(entry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self.worth_keeping:
            self._remove_all()
            for parent in self._new_parents:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        if self._lock is not None:
            self._lock.close()

    def _empty(self) -> bool:
        """What is left when a run is killed while it removes the folder."""
        return self.path.is_dir() and not any(self.path.iterdir())

    def _remove_all(self) -> None:
        # the mark last: until then the next run knows the folder for eqat's
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == MARKER):
            _remove(entry)
        shutil.rmtree(self.path, ignore_errors=True)


def _remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
