"""Writing a whole checkpoint in a format: its layers, its other tensors, and the configuration beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from .base import NO_OVERRIDES, Format, PackedFormat
from .checkpoint import CheckpointWriter
from .checkpoint_reader import CONFIG_KEYS
from .container import HasCompanions, ModelWriter, PlacingWriter
from .errors import UnsupportedSchemeError
from .model import Checkpoint
from .packed import PackedLinear
from .pieces import Header, Piece, Place
from .types import QuantizedLinear, QuantScheme

__all__ = ["FolderWriter", "create_model", "encode_layer", "write_layer", "write_model_config"]


class LayerSink(Protocol):
    """What takes a layer's tensors: a CheckpointWriter or a ModelWriter."""

    def add_layer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """One quantized layer by its module path."""


def create_model(
    fmt: Format, out: Path | str, source: Checkpoint, *, shard_size: int = 5 * 10**9, force: bool = False
) -> ModelWriter:
    """A writer that takes a quantized checkpoint over into another format's container.

    Raises:
        OutputExistsError: ``out`` exists and is not to be replaced.
    """
    own = fmt.create(Path(out), source, shard_size=shard_size, force=force)
    return FolderWriter(fmt, out, source, shard_size=shard_size, force=force) if own is None else own


class FolderWriter(PlacingWriter):
    """A folder of safetensors with everything the source had beside its weights."""

    def __init__(self, fmt: Format, out: Path | str, source: Checkpoint, *, shard_size: int, force: bool) -> None:
        self.pieces = fmt.pieces(source)
        self._format = fmt
        self._source = source
        self._writer = CheckpointWriter(out, shard_size=shard_size, force=force)

    def reserve(self, header: Header) -> Place:
        """See PlacingWriter."""
        return self._writer.reserve(header)

    def put(self, piece: Piece) -> None:
        """See PlacingWriter."""
        self._writer.add(piece.header.name, piece.data)

    def finish(self) -> None:
        """config.json, the format's sidecar files, and the source's tokenizer and other companions."""
        source = self._source
        if source.scheme is not None:
            write_model_config(
                self._writer,
                source.reader.config,
                self._format,
                source.scheme,
                source.ignore,
                overrides=source.overrides_for(self._format),
            )
        if source.reader.folder.is_dir():
            self._writer.copy_companions(source.reader.folder)
        elif isinstance(source.reader, HasCompanions):
            source.reader.write_companions(self._writer.working_folder)

    def __enter__(self) -> FolderWriter:
        try:
            self._writer.__enter__()
            return self
        except BaseException as error:  # an interrupt that comes before the with block begins
            self._writer.__exit__(type(error), error, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)


def encode_layer(fmt: Format, name: str, layer: QuantizedLinear | PackedLinear) -> dict[str, Tensor]:
    """A layer's tensors by local name; packed codes stay packed wherever the format stores the same stream.

    Raises:
        UnsupportedSchemeError: the format cannot hold it; the text names the layer.
    """
    try:
        if isinstance(layer, PackedLinear) and isinstance(fmt, PackedFormat):
            fmt.check(layer.scheme, layer.out_features, layer.in_features)
            return fmt.encode_packed(layer)
        return fmt.encode(layer if fmt.takes_packed else layer.unpack())  # type: ignore[arg-type]
    except UnsupportedSchemeError as exc:
        raise exc.at(f"layer {name}") from exc


def write_layer(writer: LayerSink, fmt: Format, name: str, layer: QuantizedLinear | PackedLinear) -> dict[str, Tensor]:
    """Encodes one layer, writes its tensors, and returns them by local name.

    Raises:
        UnsupportedSchemeError: the format cannot hold it; the text names the layer.
    """
    tensors = encode_layer(fmt, name, layer)
    writer.add_layer(name, tensors)
    return tensors


def write_model_config(
    writer: CheckpointWriter,
    source_config: Mapping[str, Any],
    fmt: Format,
    scheme: QuantScheme,
    ignore: Collection[str] = ("lm_head",),
    *,
    overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
) -> None:
    """Writes ``config.json`` and the format's sidecar files.

    Every field of ``source_config`` is kept but its quantization's, and the dtype where the format has to name one.
    """
    config = {key: value for key, value in source_config.items() if key not in CONFIG_KEYS}
    config = fmt.adapted_config(config)
    dtype = fmt.model_dtype()
    if dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config.update(dict.fromkeys(keys, str(dtype).removeprefix("torch.")))
    quantization = fmt.quantization_config(scheme, ignore, overrides)
    if quantization:
        config.update(dict.fromkeys(fmt.config_keys, quantization))
    writer.write_json("config.json", config)
    for filename, value in fmt.sidecar_files(scheme, ignore, overrides).items():
        writer.write_json(filename, value)
