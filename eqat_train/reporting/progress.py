"""What training reports while it runs, and nothing about how it is shown.

Training code takes a ``Reporter`` and calls it; ``Reporter`` itself is silent, and the terminal, JSON and log-file
versions are subclasses of it.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

__all__ = ["Reporter", "Task"]


class Task:
    """One unit of work with a known number of steps; a context manager."""

    def update(self, advance: int = 1, **metrics: float) -> None:
        """Moves ``advance`` steps on; ``metrics`` (loss, learning rates) replace the ones shown."""

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Reporter:
    """Silent reporter; subclasses show or store what they are told."""

    def message(self, text: str) -> None:
        """One line for a person."""

    def event(self, kind: str, **fields: Any) -> None:
        """One structured record, e.g. ``event("block", index=3, train_loss=..., val_loss=...)``; JSON values only."""

    def task(self, title: str, total: int) -> Task:
        """Starts a task of ``total`` steps; use it as a context manager."""
        return Task()
