"""E2E-QP on every rank but the first."""

from __future__ import annotations

from pathlib import Path

from formats.model import open_checkpoint

from ..data import TokenWindows
from ..end_to_end.state import E2eState
from ..ranks.group import together
from ..reporting.progress import Reporter
from .run import e2e_identity, train_scales
from .settings import E2eSettings

__all__ = ["follow_e2e_qp"]


def follow_e2e_qp(
    checkpoint: Path,
    data: TokenWindows,
    val: TokenWindows | None,
    settings: E2eSettings,
    state: Path,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Takes part in ``run_e2e_qp`` of rank 0.

    Args:
        checkpoint: the one that rank 0 starts from, which every rank reads.
        data: all training windows, those of rank 0.
        val: all validation windows.
        settings: the same settings.
        state: folder of the training's state, which every rank reads.
        trust_remote_code: allow Python files of the folder to run.

    Raises:
        EqatError: what ``run_e2e_qp`` raises.
    """
    identity = e2e_identity(checkpoint, data, val, settings)
    with open_checkpoint(checkpoint) as source, together():
        train_scales(source, data, val, settings, E2eState(state, identity), Reporter(), trust_remote_code)
