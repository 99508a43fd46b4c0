"""E2E-QAT on every rank but the first."""

from __future__ import annotations

from pathlib import Path

from formats.checkpoint import CheckpointReader

from ..data import TokenWindows
from ..end_to_end.state import E2eState
from ..ranks.group import together
from ..reporting.progress import Reporter
from .run import find_qat_targets, qat_identity, train_latent
from .settings import QatSettings

__all__ = ["follow_e2e_qat"]


def follow_e2e_qat(
    model_folder: Path,
    data: TokenWindows,
    val: TokenWindows | None,
    settings: QatSettings,
    state: Path,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Takes part in ``run_e2e_qat`` of rank 0.

    Args:
        model_folder: the same model.
        data: all training windows, those of rank 0.
        val: all validation windows.
        settings: the same settings.
        state: folder of the training's state, which every rank reads and writes its share of.
        trust_remote_code: allow Python files of the folder to run.

    Raises:
        EqatError: what ``run_e2e_qat`` raises.
    """
    identity = qat_identity(model_folder, data, val, settings)
    with CheckpointReader(model_folder) as reader, together():
        targets = find_qat_targets(reader, settings, trust_remote_code)
        own = E2eState(state, identity)
        trained = train_latent(reader, targets, data, val, settings, own, Reporter(), trust_remote_code)
        trained.latent.follow_writing(reader)
