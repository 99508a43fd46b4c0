"""Metadata entries as bytes, written by the gguf package."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .header import HEAD_BYTES, MAGIC
from .library import gguf_package

__all__ = ["MERGES", "head_bytes", "metadata_bytes"]

MERGES = "tokenizer.ggml.merges"
_VERSION = 3


def metadata_bytes(architecture: str, add: Callable[[Any], bool]) -> tuple[bytes, int]:
    """Entries that ``add`` gives to a ``gguf.GGUFWriter``, and how many they are.

    ``add`` returns whether merges are wanted and none: llama.cpp needs the key, and the package writes no empty array.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "metadata"
        writer = gguf_package().GGUFWriter(path, architecture)
        no_merges = add(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        data = path.read_bytes()
    (count,) = struct.unpack_from("<Q", data, HEAD_BYTES - 8)
    entries = data[HEAD_BYTES:]
    return (entries + _no_strings(MERGES), count + 1) if no_merges else (entries, count)


def head_bytes(tensors: int, entries: int) -> bytes:
    """Magic, version and the two counts."""
    return MAGIC + struct.pack("<IQQ", _VERSION, tensors, entries)


def _no_strings(key: str) -> bytes:
    raw = key.encode()
    return struct.pack("<Q", len(raw)) + raw + struct.pack("<IIQ", 9, 8, 0)  # an array of strings, of length 0
