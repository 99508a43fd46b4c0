"""The header of a safetensors file: reading it with every check, and laying one out.

A file is 8 little-endian bytes (the header's length), a JSON object of that length, then the tensors' bytes one after
the other without holes. Trailing spaces in the JSON are allowed, which is what lets a writer reserve room for it.
Source: the format section of the safetensors README and ``safetensors/src/tensor.rs``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError

__all__ = ["DTYPE_NAMES", "LENGTH_BYTES", "MAX_HEADER_BYTES", "TensorInfo", "build_header", "read_header"]

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer ones

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor.

    Attributes:
        dtype: element type.
        shape: sizes of its axes.
        nbytes: bytes of its data.
        shard: name of the file that holds it.
        offset: byte of that file where its data begins.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    shard: str
    offset: int = 0


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one file by name, after checking the header against the file's size.

    Raises:
        CheckpointError: the file is missing, shorter than its header or its data, or its header is malformed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = file.read(LENGTH_BYTES)
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) < LENGTH_BYTES or length > size - LENGTH_BYTES:
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes but the file has {size}; "
                    "it is truncated or not safetensors, fetch it again"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: the header claims {length} bytes; at most {MAX_HEADER_BYTES} allowed")
            raw = file.read(length)
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: the header is not JSON ({exc}); the file is damaged, fetch it again") from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}; expected an object")
    header.pop("__metadata__", None)
    return _check_entries(path, header, LENGTH_BYTES + length, size - LENGTH_BYTES - length)


def _check_entries(path: Path, header: dict[str, Any], start: int, data_bytes: int) -> dict[str, TensorInfo]:
    spans = []
    infos = {}
    for name, entry in header.items():
        infos[name] = _parse_entry(path, name, entry, start)
        begin = infos[name].offset - start
        spans.append((begin, begin + infos[name].nbytes, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path}: tensor {name!r} starts at byte {begin}; expected {position}")
        position = end
    if position != data_bytes:
        reason = "it is truncated, fetch it again" if data_bytes < position else "it has bytes no tensor owns"
        raise CheckpointError(f"{path}: tensors take {position} bytes but the file holds {data_bytes}; {reason}")
    return infos


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype_name), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if all(
            isinstance(size, int) and size >= 0 for size in shape
        ):
            pass
        case _:
            raise CheckpointError(f"{path}: tensor {name!r} has a malformed header entry; the file is damaged")
    if dtype_name not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype_name!r}; known are {', '.join(_DTYPES)}")
    dtype = _DTYPES[dtype_name]
    nbytes = math.prod(shape) * dtype.itemsize
    if begin < 0 or end - begin != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} ({dtype_name} {shape}) takes {nbytes} bytes but spans {begin}..{end}"
        )
    return TensorInfo(dtype, tuple(shape), nbytes, path.name, start + begin)


def build_header(entries: dict[str, dict[str, Any]], reserved: int | None = None) -> bytes:
    """Length field and JSON of a file with these entries, in file order, padded with spaces.

    Args:
        entries: name -> {"dtype", "shape", "data_offsets"}.
        reserved: exact size of the result in bytes, a multiple of 8; by default the smallest multiple of 8.

    Raises:
        ValueError: the entries do not fit in ``reserved`` bytes.
    """
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    size = -(-len(text) // 8) * 8 if reserved is None else reserved - LENGTH_BYTES
    if len(text) > size:
        raise ValueError(f"a header of {len(text)} bytes does not fit in {size}")
    return size.to_bytes(LENGTH_BYTES, "little") + text.ljust(size)
