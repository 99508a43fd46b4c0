"""Finished blocks on disk while training goes on, and the checkpoint that is put together from them.

Each finished block is one file, ``NNN.safetensors``, with its encoded tensors under their full names. The files
outlive a run that stops, and are removed once the checkpoint is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from formats.checkpoint import CheckpointReader, CheckpointWriter
from formats.errors import CheckpointError

__all__ = ["BlockFiles"]


class BlockFiles:
    """The folder of finished blocks; files of an earlier run in it are removed.

    Attributes:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.remove()
        folder.mkdir(parents=True)

    def save(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes one finished block.

        Raises:
            CheckpointError: the file cannot be written.
        """
        file = self._file(index)
        partial = file.with_suffix(".partial")
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
            os.replace(partial, file)
        except (OSError, SafetensorError) as exc:  # safetensors has an error of its own for a full disk
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write {file}: {exc}; free space there or choose another folder") from exc

    def assemble(
        self, writer: CheckpointWriter, source: CheckpointReader, owner: Mapping[str, int], replaced: Collection[str]
    ) -> None:
        """Streams a whole model: finished blocks, and every other tensor of the source unchanged, in its order.

        Args:
            writer: of the output.
            source: of the full-precision model.
            owner: tensor name -> index of its block, for every source tensor inside a block.
            replaced: source tensors that the finished blocks stand for.
        """
        written: set[int] = set()
        for name in source.tensors:
            index = owner.get(name)
            if index is not None and index not in written:
                written.add(index)
                with safe_open(self._file(index), framework="pt") as file:
                    for key in file.keys():
                        writer.add(key, file.get_tensor(key))
            if name not in replaced:
                writer.add(name, source.get(name))

    def remove(self) -> None:
        """Deletes the folder and what is in it."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:03d}.safetensors"
