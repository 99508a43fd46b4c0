"""Writing a GGUF file: streamed tensor by tensor, published at once or not at all.

The table of tensors stands before the data and holds types that are known only once a layer is encoded. Its size is
known from names and axes alone, so room is left for it and it is written last. Memory is that of the largest layer.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from ..atomic_output import AtomicOutput, writing
from ..base import Format
from ..container import PlacingWriter, SourceModel
from ..errors import CheckpointError
from ..pieces import Choice, Header, Piece, Place
from ..writeback import Writeback
from .blocks import BLOCK_TYPES
from .header import ALIGNMENT, HEAD_BYTES, ROPE_FREQS, SCHEME_KEY, TYPE_SIZES, is_gguf
from .keys import head_bytes, metadata_bytes
from .metadata import add_hyper_parameters, head_width
from .pieces import GgufPieces
from .reader import GgufReader
from .rope import llama3_factors, rope_parameters
from .tokenizer import add_tokenizer, copy_tokenizer

__all__ = ["GgufWriter"]

_TYPE_IDS = {name: number for number, (name, _, _) in TYPE_SIZES.items()}
_FTYPES = {"F32": 0, "F16": 1, "BF16": 32, **{kind.name: kind.ftype for kind in BLOCK_TYPES.values()}}


@dataclass
class _Entry:
    """A tensor's place in the table: what is planned, and what was written."""

    shape: tuple[int, ...]
    type: str = ""
    offset: int = 0


class GgufWriter(PlacingWriter):
    """One ``.gguf`` file from a quantized checkpoint; a context manager.

    Args:
        out: the file.
        source: the checkpoint that is converted: names and shapes of its tensors, configuration and tokenizer.
        form: what the file says of its own layers.
        pre_tokenizer: llama.cpp's name for how text is split before the tokenizer; recognised without it.
        force: replace an existing GGUF file, only once the new one is complete.

    Raises:
        OutputExistsError: ``out`` exists and ``force`` is not given, or it is no GGUF file.
        UnsupportedSchemeError: llama.cpp has no place for the model or one of its tensors.
        CheckpointError: the configuration or the tokenizer is missing something.
        MissingExtraError: the gguf package is not installed.
    """

    def __init__(
        self, out: Path | str, source: SourceModel, form: Format, *, pre_tokenizer: str | None = None, force: bool
    ) -> None:
        self._output = AtomicOutput(out, force=force, replaceable=_is_replaceable, unlike="is no GGUF file")
        self.path = self._output.path
        self._config = source.reader.config
        self.pieces = self._pieces = GgufPieces(source)
        self._family = self._pieces.family
        self._rope = llama3_factors(rope_parameters(self._config), head_width(self._config))
        self._entries = self._plan(source)
        self._choices: list[Choice] = []
        self._metadata, self._count = self._metadata_bytes(source, form, pre_tokenizer)
        self._file: BinaryIO | None = None
        self._writeback: Writeback | None = None
        self._data_start = _padded(HEAD_BYTES + len(self._metadata) + len(self._table()))
        self._position = self._data_start

    def reserve(self, header: Header) -> Place:
        """See PlacingWriter."""
        entry = self._entries.get(header.name)
        if entry is None or entry.type:
            state = "was not expected" if entry is None else "is added twice"
            raise CheckpointError(f"tensor {header.name} of {self.path} {state}")
        if entry.shape != header.shape:
            raise CheckpointError(
                f"tensor {header.name} has shape {list(header.shape)}; {list(entry.shape)} was announced"
            )
        place = Place(self._output.working, self._position)
        entry.type, entry.offset = header.kind, self._position - self._data_start
        self._position = _padded(self._position + header.nbytes)
        if header.choice is not None:
            self._choices.append(header.choice)
        return place

    def put(self, piece: Piece) -> None:
        """See PlacingWriter."""
        place, file = self.reserve(piece.header), self._opened()
        with writing(self.path):
            file.seek(place.offset)
            file.write(piece.data.reshape(-1).view(torch.uint8).numpy().data)
            if self._writeback is not None:
                self._writeback.reached(place.offset + piece.header.nbytes)

    def finish(self) -> None:
        """The head, now that every type and offset is known."""
        if self._rope is not None:
            header = Header(ROPE_FREQS, self._rope.dtype, tuple(self._rope.shape), self._rope.nbytes, "F32")
            self.put(Piece(header, self._rope.contiguous()))
        missing = [name for name, entry in self._entries.items() if not entry.type]
        if missing:
            raise CheckpointError(f"{len(missing)} tensors of {self.path} were never written, e.g. {missing[0]}")
        file = self._opened()
        with writing(self.path):
            file.seek(0)
            file.write(head_bytes(len(self._entries), self._count))
            file.write(self._with_file_type())
            file.write(self._table())
            file.flush()
            file.truncate(self._position)  # up to the last tensor's padding

    def choices(self) -> tuple[Choice, ...]:
        """Type and reason of each layer's weight."""
        return tuple(self._choices)

    def __enter__(self) -> GgufWriter:
        self._file = self._output.begin_file()
        self._writeback = Writeback(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(self.path):
                    self._opened().close()
                self._output.publish()
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):  # a full disk fails again here
                    self._file.close()
            self._output.discard()

    def _plan(self, source: SourceModel) -> dict[str, _Entry]:
        """Every tensor of the file, by ggml's name, with its shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in source.layer_names:
            rows, columns = source.layer_features(layer)
            shapes[f"{layer}.weight"] = (rows, columns)
            if "bias" in source.layer_shapes(layer):
                shapes[f"{layer}.bias"] = (rows,)
        shapes |= {name: source.reader.tensors[name].shape for name in source.passthrough_names}
        entries = {
            self._pieces.to_ggml(name): _Entry(shape)
            for name, shape in shapes.items()
            if not self._pieces.leaves_out(name)
        }
        if not self._pieces.tied and "lm_head.weight" not in shapes:
            raise CheckpointError("tie_word_embeddings is false and there is no lm_head; llama.cpp would tie them")
        if self._rope is not None:
            entries[ROPE_FREQS] = _Entry(tuple(self._rope.shape))
        return entries

    def _metadata_bytes(self, source: SourceModel, form: Format, pre_tokenizer: str | None) -> tuple[bytes, int]:
        """Metadata entries as the gguf package writes them, and how many they are."""

        def add(writer: Any) -> bool:
            writer.add_name(self.path.stem)
            add_hyper_parameters(writer, self._config, self._family)
            writer.add_file_type(0)
            if source.scheme is not None:
                told = form.quantization_config(source.scheme, source.ignore, source.overrides_for(form))
                writer.add_string(SCHEME_KEY, json.dumps(told, separators=(",", ":")))
            return self._add_tokenizer(writer, source, pre_tokenizer)

        return metadata_bytes(self._family.architecture, add)

    def _add_tokenizer(self, writer: Any, source: SourceModel, pre_tokenizer: str | None) -> bool:
        if isinstance(source.reader, GgufReader):
            return copy_tokenizer(writer, source.reader.metadata)
        return add_tokenizer(writer, source.reader.folder, self._config["vocab_size"], pre_tokenizer)

    def _with_file_type(self) -> bytes:
        """The metadata with ``general.file_type`` set to the type of most weights."""
        key = b"general.file_type"
        at = self._metadata.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4
        weights: Counter[str] = Counter()
        for entry in self._entries.values():
            if len(entry.shape) > 1:
                weights[entry.type] += entry.shape[0] * entry.shape[1]
        layers = {choice.stored_as for choice in self._choices}
        most = max(layers, key=lambda name: weights[name]) if layers else max(weights, key=lambda name: weights[name])
        return self._metadata[:at] + struct.pack("<I", _FTYPES[most]) + self._metadata[at + 4 :]

    def _table(self) -> bytes:
        parts = []
        for name, entry in self._entries.items():
            raw = name.encode()
            parts.append(struct.pack("<Q", len(raw)) + raw + struct.pack("<I", len(entry.shape)))
            parts.append(struct.pack(f"<{len(entry.shape)}Q", *reversed(entry.shape)))
            parts.append(struct.pack("<IQ", _TYPE_IDS.get(entry.type, 0), entry.offset))
        return b"".join(parts)

    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise CheckpointError(f"{self.path} is not open; write it inside the with block")
        return self._file


def _is_replaceable(path: Path) -> bool:
    return path.is_file() and (is_gguf(path) or path.stat().st_size == 0)


def _padded(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
