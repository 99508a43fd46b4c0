"""What is told of a finished block."""

from __future__ import annotations

from ..reporting.progress import Reporter
from .settings import BlockReport

__all__ = ["tell_block"]


def tell_block(reporter: Reporter, report: BlockReport) -> None:
    """One ``block`` event."""
    reporter.event(
        "block",
        index=report.index,
        start_val_loss=report.start_val_loss,
        train_loss=report.train_losses[-1] if report.train_losses else None,
        val_loss=report.val_losses[-1] if report.val_losses else None,
        seconds=report.seconds,
        peak_memory=report.peak_memory,
    )
