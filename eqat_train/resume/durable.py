"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import CheckpointError
from formats.safetensors_header import DTYPE_NAMES, build_header, read_header

__all__ = ["checksum", "read_json", "read_tensors", "write_json", "write_tensors"]

PARTIAL = ".partial"


def write_json(file: Path, value: Any) -> None:
    """Writes or replaces a JSON file.

    Raises:
        CheckpointError: it cannot be written.
    """
    text = json.dumps(value, indent=1) + "\n"
    _replace(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes or replaces a safetensors file, one tensor at a time; gives its checksum.

    Raises:
        CheckpointError: it cannot be written.
    """
    return _replace(file, lambda partial: _stream(partial, tensors))


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file in the order of their names, each read when its turn comes.

    Raises:
        CheckpointError: the file is damaged or cannot be read.
    """
    infos = read_header(file)
    with file.open("rb") as stream:
        for name in sorted(infos):
            info = infos[name]
            data = torch.empty(info.nbytes, dtype=torch.uint8)
            stream.seek(info.offset)
            if info.nbytes and stream.readinto(data.numpy().data) != info.nbytes:
                raise CheckpointError(f"{file} ends within tensor {name!r}; --restart discards the unfinished run")
            yield name, data.view(info.dtype).view(info.shape)


def read_json(file: Path) -> Any:
    """The value of a JSON file, None if there is no such file.

    Raises:
        CheckpointError: the file is damaged or cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{file} of an unfinished run is damaged ({exc}); --restart discards that run") from exc


def checksum(file: Path) -> str:
    """BLAKE2b of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _stream(partial: Path, tensors: Mapping[str, Tensor]) -> None:
    # wide elements first, so that each tensor begins at a multiple of its element's size
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    entries, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    with partial.open("wb") as stream:
        stream.write(build_header(entries))
        for _, tensor in ordered:
            if tensor.numel():  # a view of another dtype needs at least one element
                data = tensor.detach().cpu().contiguous().reshape(-1)
                stream.write(data.view(torch.uint8).numpy().data)


def _replace(file: Path, write: Callable[[Path], object]) -> str:
    partial = file.with_name(file.name + PARTIAL)
    try:
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        found = checksum(partial)
        os.replace(partial, file)
        _sync_folder(file.parent)
    except OSError as exc:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {file}: {exc}; free space there or choose another folder") from exc
    return found


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
