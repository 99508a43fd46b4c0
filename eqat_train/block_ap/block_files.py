"""Finished blocks on disk while training goes on, and the checkpoint that is put together from them.

Each finished block is one file, ``NNN.safetensors``, with its encoded tensors under their full names, and a record,
``NNN.json``, with the file's checksum and the block's report. The record is written last: without it a block is not
finished. The files outlive a run that stops, and are removed once the checkpoint is complete.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from formats.checkpoint import CheckpointReader, CheckpointWriter

from ..resume.durable import checksum, read_json, read_tensors, write_json, write_tensors
from ..resume.stage import StageFolder

__all__ = ["BlockFiles", "Blocks", "read_block"]


class Blocks(Protocol):
    """What training needs of the finished blocks.

    Attributes:
        folder: where their files are.
        damaged: see :class:`BlockFiles`.
        reports: of those that were finished when training began; empty where they are not needed.
        finished: how many those are.
    """

    folder: Path
    damaged: int | None
    reports: list[dict[str, Any]]

    @property
    def finished(self) -> int: ...

    def read(self, index: int) -> dict[str, Tensor]: ...

    def save(self, index: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None: ...


def read_block(folder: Path, index: int) -> dict[str, Tensor]:
    """The tensors of a finished block by full name."""
    return dict(read_tensors(_file(folder, index)))


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:03d}.safetensors"


class BlockFiles:
    """The folder of finished blocks.

    Attributes:
        folder: where the files are.
        damaged: index of the first finished block whose file is not what was written; None if all are.
        reports: of the finished blocks, from the first on.

    Args:
        folder: made with the first block.
        identity: what the blocks are trained from and with.

    Raises:
        InputError: the folder holds blocks of something else.
        CheckpointError: the folder is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.damaged: int | None = None
        self._stage = StageFolder(folder, identity, finished="[0-9]*.json")
        self.reports: list[dict[str, Any]] = []
        while (record := read_json(self._record(len(self.reports)))) is not None:
            file = self._file(len(self.reports))
            if not file.is_file() or checksum(file) != record["checksum"]:
                self.damaged = len(self.reports)
                break
            self.reports.append(record["report"])

    @property
    def finished(self) -> int:
        """Number of finished blocks, when the folder was opened."""
        return len(self.reports)

    def save(self, index: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Writes one finished block.

        Raises:
            CheckpointError: a file cannot be written.
        """
        self._stage.prepare()
        self._record(index).unlink(missing_ok=True)  # of a damaged file
        found = write_tensors(self._file(index), tensors)
        write_json(self._record(index), {"checksum": found, "report": dict(report)})

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block by full name."""
        return read_block(self.folder, index)

    def assemble(
        self,
        writer: CheckpointWriter,
        source: CheckpointReader,
        owner: Mapping[str, int],
        replaced: Collection[str],
        instead: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Streams a whole model: finished blocks, and every other tensor of the source unchanged, in its order.

        Args:
            writer: of the output.
            source: of the full-precision model.
            owner: tensor name -> index of its block, for every source tensor inside a block.
            replaced: source tensors that the finished blocks stand for.
            instead: source tensor outside the blocks -> what is written in its place.
        """
        written: set[int] = set()
        for name in source.tensors:
            index = owner.get(name)
            if index is not None and index not in written:
                written.add(index)
                for key, tensor in read_tensors(self._file(index)):
                    writer.add(key, tensor)
            for key, tensor in instead.get(name, {}).items():
                writer.add(key, tensor)
            if name not in replaced and name not in instead:
                writer.add(name, source.get(name))

    def remove(self) -> None:
        """Deletes the folder and what is in it."""
        self._stage.remove()

    def _file(self, index: int) -> Path:
        return _file(self.folder, index)

    def _record(self, index: int) -> Path:
        return self.folder / f"{index:03d}.json"
