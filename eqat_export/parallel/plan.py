"""What an export consists of, and how many processes share it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from eqat_export.encoding import layer_memory
from eqat_export.parallel.ranks import Group
from eqat_export.parallel.schedule import Task
from formats.base import Format
from formats.checkpoint_reader import CheckpointReader
from formats.container import ModelWriter, PlacingWriter
from formats.errors import InputError
from formats.model import Checkpoint

__all__ = ["Crew", "choose_crew", "plan_tasks"]

LIMIT = 2 * 2**30  # bytes that all processes of an export may take
_PARENT, _WORKER = 320 * 2**20, 140 * 2**20  # of which an idle process has its own: Python, torch, headers
_LEAST = 256 * 2**20
_COPIED = 32 * 2**20  # bytes from which a tensor is copied a few at a time


@dataclass(frozen=True)
class Crew:
    """How an export is shared.

    Attributes:
        workers: processes; 1 is this one alone.
        memory: bytes that parts under way may take together.
        keep_memory: a worker need not give freed memory back.
    """

    workers: int
    memory: int
    keep_memory: bool


def plan_tasks(checkpoint: Checkpoint, form: Format, writer: ModelWriter) -> list[Task]:
    """Every layer, then every other tensor, in file order."""
    tasks = [Task(name, "layer", layer_memory(checkpoint, form, name)) for name in checkpoint.layer_names]
    copied = isinstance(writer, PlacingWriter) and isinstance(checkpoint.reader, CheckpointReader)
    dtype = form.passthrough_dtype()
    for name in checkpoint.passthrough_names:
        info = checkpoint.reader.tensors[name]
        stays = dtype in (None, info.dtype) or not info.dtype.is_floating_point
        header = None
        if copied and stays and info.nbytes >= _COPIED and isinstance(writer, PlacingWriter):
            header = writer.pieces.unchanged(name, info)
        tasks.append(Task(name, "tensor", 2 * info.nbytes if header is None else _COPIED // 2, header))
    return tasks


def choose_crew(asked: int | None, tasks: Sequence[Task], writer: ModelWriter, group: Group | None = None) -> Crew:
    """How many processes an export takes, and the memory that is left for its parts.

    Without a number it is one, which encodes in threads: two processes were not faster (docs/results.md). Ranks are
    what torchrun started.

    Raises:
        InputError: more than one is asked for where they cannot be had.
    """
    refusal = _refusal(writer)
    if asked is not None and asked < 1:
        raise InputError(f"--workers is {asked}; it is a positive number of processes")
    if asked is not None and group is not None:
        raise InputError("--workers is for one process, and torchrun started several; leave one of the two out")
    if ((asked or 1) > 1 or group is not None) and refusal:
        what = f"--workers {asked}" if group is None else "torchrun"
        raise InputError(f"{what}: {refusal}; export with one process")
    largest = max(task.memory for task in tasks)
    workers = asked or 1 if group is None else group.size
    memory = max(LIMIT - _PARENT - workers * _WORKER, _LEAST)
    return Crew(workers, memory, keep_memory=workers * largest <= memory)


def _refusal(writer: ModelWriter) -> str | None:
    if os.name != "posix":
        return "worker processes need descriptors that are passed on, which this system does not have"
    if not isinstance(writer, PlacingWriter):
        return "this format's writer takes tensors from one process only"
    return None
