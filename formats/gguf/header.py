"""The head of a GGUF file: its metadata and where each tensor lies, with every check before anything is read.

Magic, version, counts; then key, type, value for each metadata entry; then name, axes, ggml type and offset for each
tensor; then the data, from the next multiple of the alignment. Little-endian versions 2 and 3. Source: ``docs/gguf.md``
of ggml and ``ggml/src/gguf.cpp``. The gguf package's own reader stops at types it has no number for, Q2_0 among them.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

__all__ = [
    "ALIGNMENT",
    "HEAD_BYTES",
    "MAGIC",
    "ROPE_FREQS",
    "SCHEME_KEY",
    "TYPE_SIZES",
    "GgufHeader",
    "GgufTensor",
    "is_gguf",
    "read_header",
]

MAGIC = b"GGUF"
ALIGNMENT = 32
HEAD_BYTES = 24  # magic, version, tensor count, metadata count
SCHEME_KEY = "eqat.quantization"  # ours: what the blocks were made from; llama.cpp skips keys it does not know
ROPE_FREQS = "rope_freqs.weight"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4

# ggml's number -> (name, weights a block, bytes a block); GGML_QUANT_SIZES of gguf-py, and Q2_0 of ggml-common.h.
TYPE_SIZES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table.

    Attributes:
        type: ggml's name of its type.
        shape: sizes of its axes, outermost first.
        start: byte of the file where its data begins.
        nbytes: bytes of its data.
    """

    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the data.

    Attributes:
        metadata: key -> value; arrays are lists.
        tensors: ggml name -> entry, in file order.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file starts with GGUF's magic bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> GgufHeader:
    """Metadata and tensor table of a file, checked against its size.

    Raises:
        CheckpointError: the file is missing, not GGUF, truncated or malformed.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path} is no GGUF file: it does not start with the bytes GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except OSError as exc:
        if isinstance(exc, FileNotFoundError):
            raise CheckpointError(f"{path} does not exist; give a .gguf file or a checkpoint folder") from exc
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = len(MAGIC)

    def header(self) -> GgufHeader:
        version = self.scalar("I")
        if version not in _VERSIONS:
            raise self.damaged(f"GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are read")
        tensor_count, entry_count = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self.string()
            if key in metadata:
                raise self.damaged(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(self.scalar("I"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}; expected a power of two")
        entries = [self.tensor_entry() for _ in range(tensor_count)]
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in entries:
            if name in tensors:
                raise self.damaged(f"tensor {name!r} occurs twice")
            tensors[name] = self.placed(name, kind, shape, start, offset, alignment)
        self.check_overlaps(tensors)
        return GgufHeader(metadata, tensors)

    def tensor_entry(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string()
        axes = self.scalar("I")
        if not 1 <= axes <= _MAX_DIMS:
            raise self.damaged(f"tensor {name!r} has {axes} axes; ggml has 1 to {_MAX_DIMS}")
        sizes = tuple(self.scalar("Q") for _ in range(axes))
        kind, offset = self.scalar("I"), self.scalar("Q")
        return name, kind, sizes[::-1], offset  # ggml counts the innermost axis first

    def placed(
        self, name: str, kind: int, shape: tuple[int, ...], start: int, offset: int, alignment: int
    ) -> GgufTensor:
        if kind not in TYPE_SIZES:
            raise self.damaged(f"tensor {name!r} has ggml type {kind}, which is not known here")
        type_name, block, size = TYPE_SIZES[kind]
        if shape[-1] % block:
            raise self.damaged(f"tensor {name!r} has rows of {shape[-1]}, no multiple of {type_name}'s block {block}")
        nbytes = math.prod(shape) // block * size
        if offset % alignment:
            raise self.damaged(f"tensor {name!r} starts at {offset}, no multiple of the alignment {alignment}")
        if start + offset + nbytes > len(self.data):
            raise self.damaged(
                f"tensor {name!r} ends at byte {start + offset + nbytes}, the file has {len(self.data)}; "
                "it is truncated, fetch it again"
            )
        return GgufTensor(type_name, shape, start + offset, nbytes)

    def check_overlaps(self, tensors: dict[str, GgufTensor]) -> None:
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if tensor.start < end:
                raise self.damaged(f"tensor {name!r} overlaps another one")
            end = tensor.start + tensor.nbytes

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.damaged(f"metadata type {kind} is not known")
        element, count = self.scalar("I"), self.scalar("Q")
        if element == _STRING:
            self.room(count * 8)
            return [self.string() for _ in range(count)]
        if element not in _SCALARS:
            raise self.damaged(f"metadata holds an array of type {element}")
        layout = f"<{count}{_SCALARS[element]}"
        self.room(struct.calcsize(layout))
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return list(values)

    def scalar(self, layout: str) -> Any:
        size = struct.calcsize(f"<{layout}")
        self.room(size)
        (value,) = struct.unpack_from(f"<{layout}", self.data, self.position)
        self.position += size
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.room(length)
        raw = self.data[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            # some vocabularies hold token pieces that are no UTF-8 by themselves
            return raw.decode("utf-8", errors="surrogateescape")

    def room(self, count: int) -> None:
        if count > len(self.data) - self.position:
            raise self.damaged("its head runs past its end; it is truncated, fetch it again")

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")
