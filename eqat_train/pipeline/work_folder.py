"""The folder beside an output that holds what a run needs only while it runs."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from formats.errors import InputError, TrainingDivergedError

__all__ = ["WorkFolder"]

MARKER = ".eqat-work"


class WorkFolder:
    """A temporary folder; a context manager.

    It is removed when the run succeeds, fails or is interrupted. It is kept when training diverged, with the finished
    blocks in it, and when the run failed after ``keep`` was called; the next run in the same place removes it.

    Args:
        path: the folder; made with its parents.

    Raises:
        InputError: the folder exists and is not eqat's, or another run is using it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.kept = False
        self._precious: Path | None = None
        self._lock: IO[str] | None = None
        self._new_parents: list[Path] = []

    def keep(self, precious: Path) -> None:
        """Names something in the folder that a failure, other than an interruption, must not take away."""
        self._precious = precious

    def __enter__(self) -> WorkFolder:
        marker = self.path / MARKER
        if os.path.lexists(self.path) and not marker.is_file():
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
        for entry in self.path.iterdir():
            if entry != marker:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        diverged = kind is not None and issubclass(kind, TrainingDivergedError)
        failed = kind is not None and not interrupted
        self.kept = diverged or (failed and self._precious is not None and self._precious.exists())
        if not self.kept:
            shutil.rmtree(self.path, ignore_errors=True)
            for parent in self._new_parents:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        if self._lock is not None:
            self._lock.close()
