"""State of end-to-end training on disk: parameters, AdamW's moments, and what was measured so far.

The order of the windows follows from the seed, and the learning rate from the step, so both are where they were once
the step is known. Where ranks share parameters by rows, each writes a file of its own, and any number of ranks reads
from all files what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..ranks.group import current, largest, rank, size
from ..ranks.rows import Rows, own_rows
from ..resume.durable import checksum, read_json, read_tensors, write_json, write_tensors
from ..resume.stage import StageFolder

__all__ = ["E2eProgress", "E2eState"]

RECORD = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
NONE: Mapping[Tensor, Rows] = MappingProxyType({})


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
        identity: what the parameters are trained from and with.

    Raises:
        InputError: the folder holds the state of something else.
        CheckpointError: the folder is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._stage = StageFolder(folder, identity, finished=RECORD)

    def save(
        self,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        progress: E2eProgress,
        rows: Mapping[Tensor, Rows] = NONE,
    ) -> None:
        """Writes the state after a step.

        Args:
            parameters: everything that the optimizer moves, in the same order in every process.
            optimizer: its moments are saved too.
            progress: goes into the record.
            rows: of the parameters that ranks share. Every rank calls it then; otherwise one does.

        Raises:
            CheckpointError: a file cannot be written.
        """
        if rank() == 0 or not rows:
            self._stage.prepare()
        tensors: dict[str, Tensor] = {}
        for index, parameter in enumerate(parameters):
            if rank() and parameter not in rows:
                continue  # it is whole on every rank
            tensors[f"{index}.parameter"] = parameter
            if state := optimizer.state.get(parameter):  # none before the first gradient, as of an idle expert
                tensors |= {f"{index}.{name}": state[name] for name in (*MOMENTS, "step")}
        name = f"step-{len(progress.losses):06d}"
        if rows:
            largest(0)  # the folder is there
            found = write_tensors(self.folder / _file_of(name, rank(), size()), tensors)
            files = {_file_of(name, number, size()): text for number, text in enumerate(_of_all_ranks(found))}
            if rank():
                return
        else:
            files = {_file_of(name, 0, 1): write_tensors(self.folder / _file_of(name, 0, 1), tensors)}
        write_json(self.folder / RECORD, {"files": files, **asdict(progress)})
        for other in self.folder.glob("step-*.safetensors"):
            if other.name not in files:
                other.unlink()

    def load(
        self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, rows: Mapping[Tensor, Rows] = NONE
    ) -> E2eProgress | None:
        """Puts the state where it was; None when there is none.

        Args:
            parameters: as they were given to ``save``, by any number of ranks.
            optimizer: of the same parameters.
            rows: of the parameters that ranks share now.

        Raises:
            CheckpointError: the record is damaged.
            DamagedStateError: a file of the state is not what was written.
        """
        record = read_json(self.folder / RECORD)
        if record is None:
            return None
        files = {self.folder / name: found for name, found in record.pop("files").items()}
        for file, found in files.items():
            if not file.is_file() or checksum(file) != found:
                raise DamagedStateError(file)
        states: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(parameters))}
        with torch.no_grad():
            for number, file in enumerate(files):
                for full, tensor in read_tensors(file):
                    index, _, name = full.partition(".")
                    parameter = parameters[int(index)]
                    if name == "step":
                        states[int(index)][name] = tensor
                        continue
                    target: Tensor = parameter
                    if name != "parameter":
                        target = states[int(index)].setdefault(name, torch.zeros_like(parameter))
                    wanted = rows.get(parameter) or Rows(len(parameter), 0, 1)
                    _put(target, wanted.own, tensor, Rows(wanted.count, number, len(files)).own.start)
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


def _put(target: Tensor, wanted: slice, found: Tensor, first: int) -> None:
    """Copies those rows of a whole that were found, from ``first`` on, into a tensor that holds the wanted ones."""
    begin, end = max(wanted.start, first), min(wanted.stop, first + len(found))
    if begin < end:
        target[begin - wanted.start : end - wanted.start] = found[begin - first : end - first].to(target.device)


def _file_of(name: str, number: int, ranks: int) -> str:
    return f"{name}.safetensors" if ranks == 1 else f"{name}.rank-{number:04d}-of-{ranks:04d}.safetensors"


def _of_all_ranks(found: str) -> list[str]:
    """Every rank's checksum, when every rank has its own."""
    own = torch.frombuffer(bytearray.fromhex(found), dtype=torch.uint8)[None]
    ranks = current()
    everyone = own_rows(size()).gather(own if ranks is None else own.to(ranks.device)).wait()
    return [bytes(row).hex() for row in everyone.cpu().tolist()]
