"""Device and dtype by the names users write, and how much memory a run took."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys

import torch

from formats.errors import InputError

from .ranks.group import current

__all__ = ["DTYPES", "give_back_freed_memory", "peak_memory", "resolve_device", "resolve_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device of ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; auto is the GPU if there is one.

    Under torchrun it is the rank's own, whatever the name.

    Raises:
        InputError: no such device here.
    """
    if (ranks := current()) is not None:
        return ranks.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise InputError(f"--device is {name!r}; allowed are auto, cpu, cuda and cuda:N")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if int(index or 0) >= count:
        raise InputError(f"--device is {name!r}, but torch sees {count} CUDA devices here; use auto or cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of ``auto``, ``float32``, ``bfloat16`` or ``float16``; auto is bfloat16 on a GPU, float32 on a CPU.

    Raises:
        InputError: no such name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"--dtype is {name!r}; allowed are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator since its peak was last reset, else of the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_freed_memory() -> None:
    """Returns what was freed to the system, where the C library keeps it (glibc); elsewhere it does nothing.

    Otherwise holes of a heap stay resident, each block's tensors come to lie in other ones, and a process grows with
    every block though it holds no more than one.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
