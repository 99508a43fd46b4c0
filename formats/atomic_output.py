"""An output that appears complete at its path, or not at all.

It is made as a hidden sibling, ``.NAME.partial-XXXXXXXX``, and renamed when it is complete and on disk. A process that
is killed leaves its sibling behind; the next one that writes to the same path removes it. A lock (flock) that ends with
its process tells a dead owner from a living one, on whichever machine; where the file system has no such locks, nothing
is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import CheckpointError, OutputExistsError

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

__all__ = ["AtomicOutput", "sync", "writing"]

_LIMITS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AtomicOutput:
    """One file or folder to be.

    Attributes:
        path: where it appears, absolute.
        working: where it is made.

    Args:
        path: as given by the user.
        force: replace what is there, only once the new one is complete.
        replaceable: whether what is there is something that ``force`` may replace.
        unlike: what is said of anything else, e.g. "is no GGUF file".

    Raises:
        OutputExistsError: on construction and again on publishing, when something is there that is not to be replaced.
        CheckpointError: the system refuses to write; nothing is left behind.
    """

    def __init__(self, path: Path | str, *, force: bool, replaceable: Callable[[Path], bool], unlike: str) -> None:
        self.path = Path(os.path.abspath(path))
        self.working = self.path.with_name(f".{self.path.name}.partial-{secrets.token_hex(4)}")
        self._force = force
        self._replaceable = replaceable
        self._unlike = unlike
        self._new_parents: list[Path] = []
        self._lock: int | None = None
        self._check()

    def begin_folder(self) -> None:
        """Makes the working folder."""
        with self._beginning():
            self.working.mkdir()
            while not self._owned():
                self.working.mkdir(exist_ok=True)

    def begin_file(self) -> BinaryIO:
        """Makes and opens the working file; the caller closes it."""
        with self._beginning():
            file = self.working.open("wb")
            while not self._owned():
                file.close()
                file = self.working.open("wb")
        return file

    def publish(self) -> None:
        """Puts what was made in its place; everything in it is on disk before."""
        with writing(self.path):
            for path in [*self.working.iterdir()] if self.working.is_dir() else []:
                if path.is_file():
                    sync(path)
            sync(self.working)
            self._check()  # it may have appeared while this one was being written
            self._replace()
            sync(self.path.parent)

    def discard(self) -> None:
        """Removes what was not published, and folders that were made for it. May be called again."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        _remove(self.working)
        if not os.path.lexists(self.path):
            for parent in self._new_parents:
                with contextlib.suppress(OSError):  # someone else may have put something there
                    parent.rmdir()

    @contextlib.contextmanager
    def _beginning(self) -> Iterator[None]:
        self._new_parents = [parent for parent in self.path.parents if not parent.exists()]
        try:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._remove_stale()
                yield
        except BaseException:  # an interrupt that comes before the caller's with block begins
            self.discard()
            raise

    def _owned(self) -> bool:
        """Takes the lock of what was just made; False where a process that looked for stale ones was faster."""
        try:
            self._lock = _lock(self.working)
        except (BlockingIOError, FileNotFoundError):
            return False
        if self.working.exists():
            return True
        if self._lock is not None:
            os.close(self._lock)
        return False

    def _check(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self._force:
            raise OutputExistsError(f"output {self.path} exists; choose another --out or give --force to replace it")
        if not self._replaceable(self.path):
            raise OutputExistsError(
                f"output {self.path} exists and {self._unlike}, and --force replaces only those; choose another --out"
            )

    def _replace(self) -> None:
        if not self.working.is_dir() or not os.path.lexists(self.path):
            self.working.replace(self.path)
            return
        with tempfile.TemporaryDirectory(prefix=f".{self.path.name}.replaced-", dir=self.path.parent) as attic:
            previous = Path(attic) / self.path.name
            self.path.rename(previous)
            try:
                self.working.rename(self.path)
            except BaseException:
                previous.rename(self.path)
                raise

    def _remove_stale(self) -> None:
        """Removes siblings of processes that are gone."""
        pattern = re.compile(re.escape(f".{self.path.name}.partial-") + "[0-9a-f]{8}")
        for path in self.path.parent.iterdir():
            if not pattern.fullmatch(path.name) or path == self.working:
                continue
            try:
                lock = _lock(path)
            except OSError:  # its owner lives, or it is somebody else's, or gone already
                continue
            if lock is not None:
                _remove(path)
                os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder; None where the system has no such locks.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be opened.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(descriptor)
        if exc.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(exc.errno, exc.strerror) from exc
        return None
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals into one line that names the output."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _LIMITS:
            raise CheckpointError(
                f"no space left while writing {path}; free some disk or choose another --out"
            ) from exc
        raise CheckpointError(f"cannot write {path}: {exc.strerror or exc}; choose another --out") from exc


def sync(path: Path) -> None:
    """Returns when a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
