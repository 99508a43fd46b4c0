"""Block-AP on every rank but the first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.checkpoint import CheckpointReader

from ..models.loading import build_skeleton
from ..reporting.progress import Reporter
from .block_files import read_block
from .run import BlockApRun
from .settings import BlockApSettings
from .shares import own_settings

__all__ = ["follow_block_ap"]


class _BlocksOfRank0:
    """Finished blocks as a rank sees them that writes none.

    Attributes:
        folder: where rank 0 writes them.
        finished: blocks that were finished when training began.
    """

    def __init__(self, folder: Path, finished: int) -> None:
        self.folder, self.finished = folder, finished
        self.damaged: int | None = None
        self.reports: list[dict[str, Any]] = []

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block by full name."""
        return read_block(self.folder, index)

    def save(self, index: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Rank 0 does that."""


def follow_block_ap(
    model_folder: Path,
    train: Tensor,
    val: Tensor,
    settings: BlockApSettings,
    blocks: Path,
    finished: int,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Takes part in ``run_block_ap`` of rank 0.

    Args:
        model_folder: the same model.
        train: all training samples, those of rank 0.
        val: all validation samples.
        settings: the same settings.
        blocks: folder of the finished blocks, which every rank reads.
        finished: how many there are.
        trust_remote_code: allow Python files of the model folder to run.

    Raises:
        EqatError: what ``run_block_ap`` raises.
    """
    torch.manual_seed(settings.seed)
    with CheckpointReader(model_folder) as reader:
        model = build_skeleton(model_folder, torch.float32, trust_remote_code=trust_remote_code)
        run = BlockApRun(reader, model, own_settings(settings), Reporter())
        run.train(train, val, _BlocksOfRank0(blocks, finished), blocks.parent)
