"""What a stage was started with, in a form that can be kept and compared: settings, weights and data."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats import QuantScheme

__all__ = ["differences", "folder_fingerprint", "settings_identity", "tensor_fingerprint"]

# Slices of each weight file that are looked at: reading 140 GB again would take minutes, and another fine-tune of the
# same model differs everywhere.
SLICES, SLICE_BYTES = 16, 2**16


def folder_fingerprint(folder: Path) -> dict[str, str]:
    """File name -> size and hash of evenly spaced slices, of a model folder's configuration and weights."""
    files = sorted(file for pattern in ("*.safetensors", "config.json") for file in folder.glob(pattern))
    return {file.name: _sampled(file) for file in files}


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        for index in range(SLICES):
            stream.seek(index * max(0, size - SLICE_BYTES) // (SLICES - 1))
            digest.update(stream.read(SLICE_BYTES))
    return f"{size} bytes {digest.hexdigest()}"


def tensor_fingerprint(*tensors: Tensor) -> str:
    """Hash of shapes, dtypes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def settings_identity(settings: Any, *, without: Collection[str] = ()) -> dict[str, Any]:
    """A settings dataclass as JSON values.

    Args:
        settings: dataclass of plain values, dtypes, devices and schemes.
        without: fields that do not change the result.
    """
    return {item.name: _plain(getattr(settings, item.name)) for item in fields(settings) if item.name not in without}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, QuantScheme):
        return str(value)
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, Mapping):  # its order may matter, and JSON objects have none
        return [[name, _plain(item)] for name, item in value.items()]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One text for each value that differs, e.g. ``lr_weight was 2e-05 and is 0.0001``."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        one, other = before.get(name), now.get(name)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping) and name == "settings":
            found += differences(one, other)
        elif name == "settings" or not _short(one) or not _short(other):
            found.append(f"{name} differ")
        else:
            found.append(f"{name} was {one} and is {other}")
    return found


def _short(value: Any) -> bool:
    return not isinstance(value, Mapping) and not (isinstance(value, str) and len(value) > 24)
