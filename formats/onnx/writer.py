"""Writing the folder: tensors appended to external data as they come, the graph last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import torch

from ..atomic_output import writing
from ..checkpoint_reader import read_json
from ..checkpoint_writer import CheckpointWriter
from ..container import PlacingWriter, SourceModel
from ..errors import CheckpointError
from ..model_writer import write_model_config
from ..pieces import Header, Piece, Place
from ..safetensors_header import TensorInfo
from ..writeback import Writeback
from .decoder import read_decoder, rotary_caches
from .extra import require_onnx
from .genai import GENAI_NAME, genai_config
from .graph import GRAPH_NAME, ONNX_TYPES, ROTARY_NAMES, NBits, build_graph
from .layout import OnnxLayout, block_size

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxWriter"]

ALIGNMENT = 4096  # onnxruntime maps external data, which begins on pages


class OnnxWriter(PlacingWriter):
    """A folder with ``model.onnx``, its external data, configurations and tokenizer.

    Memory is that of the largest tensor: bytes go to disk as they arrive, and the graph holds none of them.

    Raises:
        MissingExtraError: the package onnx is not installed.
        OutputExistsError: ``out`` exists and is not to be replaced.
        UnsupportedSchemeError: the graph has no place for this model.
    """

    def __init__(self, fmt: OnnxLayout, out: Path, source: SourceModel, *, shard_size: int, force: bool) -> None:
        require_onnx("writing an ONNX model")
        self.pieces = fmt.pieces(source)
        self._format = fmt
        self._source = source
        self._decoder = read_decoder(source.reader.config)
        self._layers = {name: self._attributes(name) for name in source.layer_names if fmt.holds_module(name)}
        self._stored: dict[str, TensorInfo] = {}
        self._graph(self._expected())
        self._writer = CheckpointWriter(out, shard_size=shard_size, force=force)
        self._shard_size = shard_size
        self._file: BinaryIO | None = None
        self._end = 0  # of what is reserved in it
        self._writeback: Writeback | None = None
        self._files = 0

    def reserve(self, header: Header) -> Place:
        """See PlacingWriter.

        Raises:
            CheckpointError: the name was added before, ONNX has no such dtype, or the disk is full.
        """
        name = header.name
        if name in self._stored:
            raise CheckpointError(f"tensor {name!r} is added twice to {self._writer.folder}")
        if header.dtype not in ONNX_TYPES:
            raise CheckpointError(f"tensor {name!r} is {header.dtype}, which the ONNX writer does not hold")
        with writing(self._writer.folder):
            file = self._file_for(header.nbytes)
        path, offset = Path(file.name), self._end + -self._end % ALIGNMENT
        self._end = offset + header.nbytes
        self._stored[name] = TensorInfo(header.dtype, header.shape, header.nbytes, path.name, offset)
        return Place(path, offset)

    def put(self, piece: Piece) -> None:
        """See PlacingWriter."""
        place = self.reserve(piece.header)
        file, flat = self._file, piece.data.reshape(-1)
        if file is None or not flat.numel():
            return
        with writing(self._writer.folder):
            file.seek(place.offset)
            file.write(flat.view(torch.uint8).numpy().data)
            if self._writeback is not None:
                self._writeback.reached(self._end)

    def finish(self) -> None:
        """The graph, config.json, genai_config.json, and the source's tokenizer and other companions."""
        for name, cache in zip(ROTARY_NAMES, rotary_caches(self._decoder), strict=True):
            self.add(name, cache.to(self._format.scale_dtype))
        source, folder = self._source, self._source.reader.folder
        graph = self._graph(self._stored).SerializeToString(deterministic=True)
        with writing(self._writer.folder):
            self._close()
            (self._writer.working_folder / GRAPH_NAME).write_bytes(graph)
        if source.scheme is not None:
            write_model_config(
                self._writer,
                source.reader.config,
                self._format,
                source.scheme,
                source.ignore,
                overrides=source.overrides_for(self._format),
            )
        path = folder / "generation_config.json"
        generation = read_json(path) if path.exists() else {}
        self._writer.write_json(GENAI_NAME, genai_config(self._decoder, GRAPH_NAME, source.reader.config, generation))
        if folder.is_dir():
            self._writer.copy_companions(folder)

    def __enter__(self) -> OnnxWriter:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._writer.__exit__(kind, error, trace)

    def _attributes(self, name: str) -> NBits:
        scheme = self._source.layer_scheme(name)
        rows, columns = self._source.layer_features(name)
        return NBits(self._format.stored_bits(scheme.bits), block_size(scheme, columns), rows, columns)

    def _expected(self) -> dict[str, TensorInfo]:
        """Every tensor to come, without its place."""
        source = self._source
        names = {name: source.reader.tensors[name] for name in source.passthrough_names}
        expected = {name: _unplaced(info.dtype, info.shape) for name, info in names.items()}
        for layer in source.layer_names:
            if not self._format.holds_module(layer):  # a quantized embedding comes as ordinary weights
                expected[f"{layer}.weight"] = _unplaced(torch.float32, source.layer_features(layer))
                continue
            locals_ = ["B", "scales", "zero_points", *(["bias"] if "bias" in source.layer_shapes(layer) else [])]
            expected |= {f"{layer}.{local}": _unplaced(torch.uint8, ()) for local in locals_}
        return expected | {name: _unplaced(self._format.scale_dtype, ()) for name in ROTARY_NAMES}

    def _graph(self, tensors: Mapping[str, TensorInfo]) -> onnx.ModelProto:
        fmt = self._format
        return build_graph(self._decoder, tensors, self._layers, fmt.scale_dtype, fmt.accuracy_level)

    def _file_for(self, nbytes: int) -> BinaryIO:
        if self._file is not None and self._end + nbytes > self._shard_size:
            self._close()
        if self._file is None:
            suffix = f".{self._files}" if self._files else ""
            self._file = (self._writer.working_folder / f"{GRAPH_NAME}.data{suffix}").open("wb")
            self._writeback = Writeback(self._file)
            self._files, self._end = self._files + 1, 0
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _unplaced(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(dtype, shape, 0, "", 0)
