"""Tensors as containers store them, and where in which file.

What becomes of a tensor on its way into a container depends on the tensor and its model alone (``Pieces``); where it
goes depends on everything before it, and is for the one writer to say. So encoding can be spread over processes, each
of which writes its own bytes, and the output is the same however many there are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .safetensors_header import TensorInfo

__all__ = ["Choice", "Header", "Piece", "Pieces", "Place", "write_bytes"]

_MOST = 2**30  # bytes written by one call; Linux takes no more than 2 GiB


@dataclass(frozen=True)
class Choice:
    """How a writer decided to store one tensor, where its container has several ways.

    Attributes:
        name: the tensor's name in the container.
        stored_as: the type it got, e.g. ``Q2_0``.
        bits_per_weight: what that type takes.
        why: half a sentence.
    """

    name: str
    stored_as: str
    bits_per_weight: float
    why: str


@dataclass(frozen=True)
class Header:
    """What a container notes of a tensor.

    Attributes:
        name: in the container.
        dtype: of the stored data.
        shape: as the container notes it.
        nbytes: of the stored data.
        kind: the container's own type, where it has types that are no dtypes.
        choice: why it is of that kind.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    kind: str = ""
    choice: Choice | None = None


@dataclass(frozen=True)
class Piece:
    """One tensor ready to be written: what is noted of it, and contiguous data on the CPU."""

    header: Header
    data: Tensor


@dataclass(frozen=True)
class Place:
    """Room in a file, as large as the tensor that it was reserved for.

    Attributes:
        path: the file, which exists.
        offset: byte at which the data begins.
    """

    path: Path
    offset: int


class Pieces:
    """Tensors keep their names, dtypes and bytes; formats whose containers change any of these have their own."""

    def of_layer(self, name: str, tensors: Mapping[str, Tensor]) -> list[Piece]:
        """One quantized layer: its module path, and local name -> tensor as the format encodes it."""
        return [piece for local, tensor in tensors.items() for piece in self.of_tensor(f"{name}.{local}", tensor)]

    def of_tensor(self, name: str, tensor: Tensor) -> list[Piece]:
        """One tensor that belongs to no quantized layer, by its full name; none where the container leaves it out."""
        data = tensor.detach().cpu().contiguous()
        return [Piece(Header(name, data.dtype, tuple(data.shape), data.nbytes), data)]

    def unchanged(self, name: str, info: TensorInfo) -> Header | None:
        """What is noted of a tensor of no quantized layer whose bytes are stored as they are; None if they may not."""
        return Header(name, info.dtype, info.shape, info.nbytes)


def write_bytes(file: int, offset: int, data: Tensor) -> None:
    """Writes a contiguous tensor's bytes into an open file.

    Raises:
        OSError: the system refuses.
    """
    flat = data.reshape(-1)
    if not flat.numel():  # a view of another dtype needs at least one element
        return
    left = memoryview(flat.view(torch.uint8).numpy().data)
    while left:
        count = os.pwrite(file, left[:_MOST], offset)
        left, offset = left[count:], offset + count
