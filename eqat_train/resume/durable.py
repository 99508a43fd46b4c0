"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from formats.errors import CheckpointError

__all__ = ["checksum", "read_json", "write_json", "write_tensors"]

PARTIAL = ".partial"


def write_json(file: Path, value: Any) -> None:
    """Writes or replaces a JSON file.

    Raises:
        CheckpointError: it cannot be written.
    """
    text = json.dumps(value, indent=1) + "\n"
    _replace(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes or replaces a safetensors file; gives its checksum.

    Raises:
        CheckpointError: it cannot be written.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return _replace(file, lambda partial: save_file(held, partial))


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


def _replace(file: Path, write: Callable[[Path], object]) -> str:
    partial = file.with_name(file.name + PARTIAL)
    try:
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        found = checksum(partial)
        os.replace(partial, file)
        _sync_folder(file.parent)
    except (OSError, SafetensorError) as exc:  # safetensors has an error of its own for a full disk
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {file}: {exc}; free space there or choose another folder") from exc
    return found


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
