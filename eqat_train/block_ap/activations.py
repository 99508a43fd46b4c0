"""Where the hidden states that blocks train on are kept.

A store holds one stream of hidden states, ``[samples, seq, hidden]``, on the GPU, in RAM (pinned when the computing
device is CUDA, so that copies run beside the computation) or in a memory-mapped file. A stream is overwritten in place
as it advances through the blocks.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from formats.errors import InputError

from ..models.experts import features_per_token

__all__ = ["ActivationStore", "Place", "PlaceChoice", "bytes_to_train", "choose_place"]

Place = Literal["gpu", "ram", "disk"]

# Share of free memory that activations may take; the rest is for the block in training and everything else.
_GPU_SHARE, _RAM_SHARE, _DISK_SHARE = 0.6, 0.6, 0.95


def bytes_to_train(layers: Iterable[nn.Module], tokens: int) -> int:
    """Device bytes that training the largest block takes, roughly.

    32 a parameter (weight, gradient, two moments, dequantized weight, copies in the compute dtype), and 16 for each
    element that enters or leaves a linear.

    Args:
        layers: the blocks.
        tokens: of a batch.
    """
    return max(
        32 * sum(p.numel() for p in layer.parameters()) + round(16 * tokens * features_per_token(layer))
        for layer in layers
    )


@dataclass(frozen=True)
class PlaceChoice:
    """Where activations go, their size, and a line that says so."""

    place: Place
    nbytes: int

    def __str__(self) -> str:
        where = {"gpu": "on the GPU", "ram": "in RAM", "disk": "on disk"}[self.place]
        return f"activations {where}: {_size(self.nbytes)}"


def choose_place(
    requested: Place | Literal["auto"],
    nbytes: int,
    device: torch.device,
    work_dir: Path,
    *,
    reserved: int = 0,
    dtype: torch.dtype = torch.float32,
    sharing: int = 1,
) -> PlaceChoice:
    """Picks the fastest place that holds all streams, or checks the requested one.

    Args:
        requested: a place, or "auto" for the first of GPU, RAM and disk with room.
        nbytes: size of all streams together.
        device: the computing device; "gpu" needs CUDA.
        work_dir: folder of the files that "disk" uses.
        reserved: bytes the computation itself needs on the device.
        dtype: of the streams, for the advice where they do not fit.
        sharing: processes on this machine that need as much of its RAM or disk.

    Raises:
        InputError: the requested place does not exist or has too little room, or no place has room.
    """
    room: dict[Place, int] = {
        "gpu": int((_free_gpu(device) - reserved) * _GPU_SHARE),
        "ram": int(psutil.virtual_memory().available * _RAM_SHARE) // sharing,
        "disk": int(shutil.disk_usage(work_dir).free * _DISK_SHARE) // sharing,
    }
    if requested == "gpu" and device.type != "cuda":
        raise InputError(f"activations 'gpu' need a CUDA device and the device is {device}; use ram, disk or auto")
    if requested != "auto" and requested not in room:
        raise InputError(f"activations is {requested!r}; allowed are auto, gpu, ram and disk")
    candidates: list[Place] = list(room) if requested == "auto" else [requested]
    for place in candidates:
        if nbytes <= room[place]:
            return PlaceChoice(place, nbytes)
    free = ", ".join(f"{place} {_size(max(room[place], 0))}" for place in candidates)
    elsewhere = "--work on a larger disk" if "disk" in candidates else "--activations auto"
    half = "--activation-dtype bfloat16 (half of it), " if dtype == torch.float32 else ""
    raise InputError(
        f"activations take {_size(nbytes)} in {str(dtype).removeprefix('torch.')} and usable are {free}; "
        f"use {half}fewer --samples, a shorter --seq-len, or {elsewhere}"
    )


def _size(nbytes: int) -> str:
    unit, name = next(
        ((2**power, name) for power, name in ((30, "GiB"), (20, "MiB")) if nbytes >= 2**power), (1024, "KiB")
    )
    return f"{nbytes / unit:.2f} {name}"


def _free_gpu(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0]


class ActivationStore:
    """One stream of hidden states; a context manager that deletes its file, if any.

    Attributes:
        shape: samples, seq, hidden.
        device: the computing device.
        dtype: in which hidden states are kept.

    Args:
        shape: samples, seq, hidden.
        dtype: dtype in which hidden states are kept.
        place: gpu, ram or disk.
        device: the computing device: what ``read`` gives and ``write`` takes.
        file: path of the memory-mapped file for "disk", created at its full size.

    Raises:
        InputError: no space for the file.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, place: Place, device: torch.device, file: Path
    ) -> None:
        self.shape, self.device, self.dtype, self._file = shape, device, dtype, file if place == "disk" else None
        if place == "gpu":
            self._data = torch.empty(shape, dtype=dtype, device=device)
        elif place == "ram":
            self._data = torch.empty(shape, dtype=dtype)
            self._pin()
        else:
            self._data = _mapped(shape, dtype, file)

        # Only float16 has a range that hidden states leave; kept on the device, so that writing never waits.
        self._largest = torch.zeros((), device=device) if dtype == torch.float16 else None

    def __len__(self) -> int:
        return self.shape[0]

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._data.is_cpu and self._data.is_pinned():
            torch.cuda.synchronize(self.device)
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._data.data_ptr())))
        self._data = torch.empty(0)
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _pin(self) -> None:
        # pin_memory=True would round the size up to a power of two.
        if self.device.type == "cuda" and self._data.numel():
            cudart = torch.cuda.cudart()
            torch.cuda.check_error(int(cudart.cudaHostRegister(self._data.data_ptr(), self._data.nbytes, 0)))

    @property
    def is_on_device(self) -> bool:
        """Whether hidden states are kept where they are computed with."""
        return self._data.device.type == self.device.type

    @property
    def is_pinned(self) -> bool:
        """Whether they are kept in memory that the device can copy from by itself."""
        return self._data.is_cpu and self._data.is_pinned()

    def samples(self, start: int, stop: int) -> Tensor:
        """Samples ``start..stop-1`` where and as they are kept, not copied."""
        return self._data[start:stop]

    def read(self, start: int, stop: int) -> Tensor:
        """Samples ``start..stop-1`` on the computing device, fp32 whatever they are kept in."""
        return self._data[start:stop].to(self.device, non_blocking=True).float()

    def write(self, start: int, hidden_states: Tensor) -> None:
        """Overwrites samples from ``start`` on.

        Copies to pinned memory are not waited for: only reads by the same device follow, in the same order.
        """
        if self._largest is not None:
            self._largest = torch.maximum(self._largest, hidden_states.abs().amax().float())
        target = self._data[start : start + hidden_states.shape[0]]
        target.copy_(hidden_states, non_blocking=target.is_pinned() or target.is_cuda)

    def check_range(self) -> None:
        """Refuses finite hidden states that became infinite when they were kept; waits for the device.

        Raises:
            InputError: there were some since the store was made.
        """
        if self._largest is None:
            return
        largest, limit = self._largest.item(), torch.finfo(torch.float16).max
        if limit < largest < math.inf:
            raise InputError(
                f"hidden states reach {largest:.3g} and --activation-dtype float16 holds {limit:.0f} at the most; "
                "use --activation-dtype bfloat16 (as small) or float32"
            )

    def copy_from(self, other: ActivationStore) -> None:
        """Overwrites the whole stream with another of the same shape."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # pending copies into the other's pinned memory
        self._data.copy_(other._data)


def _mapped(shape: tuple[int, int, int], dtype: torch.dtype, file: Path) -> Tensor:
    count = shape[0] * shape[1] * shape[2]
    nbytes = count * dtype.itemsize
    if not count:
        return torch.empty(shape, dtype=dtype)
    try:
        with file.open("wb") as handle:
            handle.truncate(nbytes)
            if hasattr(os, "posix_fallocate"):  # a full disk shows now, not as SIGBUS hours later
                os.posix_fallocate(handle.fileno(), 0, nbytes)
    except OSError as exc:
        file.unlink(missing_ok=True)
        raise InputError(
            f"{file} of {nbytes / 2**30:.2f} GiB cannot be created ({exc.strerror}); "
            "use a work folder on a larger disk, or fewer samples"
        ) from exc
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
