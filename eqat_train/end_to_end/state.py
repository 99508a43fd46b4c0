"""E2E-QP's state on disk: scales, AdamW's moments, and what was measured so far.

The order of the windows follows from the seed, and the learning rate from the step, so both are where they were once
the step is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..resume.durable import checksum, read_json, read_tensors, write_json, write_tensors
from ..resume.stage import StageFolder

__all__ = ["E2eProgress", "E2eState"]

RECORD = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class E2eProgress:
    """How far training is.

    Attributes:
        losses: of each step so far.
        grad_norms: of each step so far.
        val_loss_before: mean validation loss of the starting checkpoint; None without validation data.
    """

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    val_loss_before: float | None


class E2eState:
    """The folder of the state; a record names the file that is valid and its checksum, and is replaced last.

    Args:
        folder: made when the state is first saved.
        identity: what the scales are trained from and with.

    Raises:
        InputError: the folder holds the state of something else.
        CheckpointError: the folder is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._stage = StageFolder(folder, identity, finished=RECORD)

    def save(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, progress: E2eProgress) -> None:
        """Writes the state after a step.

        Raises:
            CheckpointError: a file cannot be written.
        """
        self._stage.prepare()
        tensors = {f"{index}.scales": parameter for index, parameter in enumerate(parameters)}
        for index, parameter in enumerate(parameters):
            if state := optimizer.state.get(parameter):  # none before the first gradient, as of an idle expert
                tensors |= {f"{index}.{name}": state[name] for name in (*MOMENTS, "step")}
        file = self.folder / f"step-{len(progress.losses):06d}.safetensors"
        found = write_tensors(file, tensors)
        record = {
            "file": file.name,
            "checksum": found,
            "losses": progress.losses,
            "grad_norms": progress.grad_norms,
            "val_loss_before": progress.val_loss_before,
        }
        write_json(self.folder / RECORD, record)
        for other in self.folder.glob("step-*.safetensors"):
            if other != file:
                other.unlink()

    def load(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> E2eProgress | None:
        """Puts the state where it was; None when there is none.

        Raises:
            CheckpointError: the record is damaged.
            DamagedStateError: the state's file is not what was written.
        """
        record = read_json(self.folder / RECORD)
        if record is None:
            return None
        file = self.folder / str(record["file"])
        if not file.is_file() or checksum(file) != record["checksum"]:
            raise DamagedStateError(file)
        states: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(parameters))}
        with torch.no_grad():
            for full, tensor in read_tensors(file):
                number, _, name = full.partition(".")
                parameter = parameters[int(number)]
                if name == "scales":
                    parameter.copy_(tensor)
                else:
                    states[int(number)][name] = tensor.to(parameter.device)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
        return E2eProgress(tuple(record["losses"]), tuple(record["grad_norms"]), record["val_loss_before"])

    def remove(self) -> None:
        """Deletes the folder and what is in it."""
        self._stage.remove()


class DamagedStateError(Exception):
    """A state file that is not what was written."""

    def __init__(self, file: Path) -> None:
        super().__init__(f"{file} is damaged (checksum)")
