"""A whole checkpoint: which layers are quantized and how, and the full-precision state dict behind them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .base import EMBEDDINGS, Format, PackedFormat
from .checkpoint import CheckpointReader
from .container import ModelReader
from .errors import CheckpointError, UnknownFormatError
from .packed import PackedLinear
from .registry import available_formats, get_format
from .types import QuantizedLinear, QuantScheme

__all__ = ["Checkpoint", "open_checkpoint"]

_PACKED_SUFFIXES = (".qweight", ".weight_packed", ".qzeros")


def open_checkpoint(folder: Path | str, format_id: str | None = None) -> Checkpoint:
    """Opens a checkpoint in any known format, or in full precision.

    Args:
        folder: local folder, or the file of a format that has a container of its own.
        format_id: read it as this format whatever its configuration says; by default it is detected.

    Raises:
        CheckpointError: the folder is damaged or contradicts itself.
        UnknownFormatError: it is quantized in a way no known format recognises, or ``format_id`` is unknown.
    """
    asked = None if format_id is None else get_format(format_id)
    own = next((fmt for fmt in _containers(asked) if fmt.reads(Path(folder))), None)
    reader: ModelReader = CheckpointReader(folder) if own is None else own.open(Path(folder))
    fmt = asked or _detect(reader)
    try:
        checkpoint = Checkpoint(reader, fmt if fmt is not None and fmt.readable else None)
        if asked is not None and checkpoint.layer_names:
            checkpoint.layer_features(checkpoint.layer_names[0])
    except CheckpointError as exc:
        other = _other_format(reader, asked)
        if other is None:
            raise
        raise CheckpointError(
            f"{folder} is labelled {other}, and read as {format_id} it makes no sense: {exc}; leave --from out"
        ) from exc
    return checkpoint


class Checkpoint:
    """A checkpoint folder seen as a model; a context manager.

    Attributes:
        reader: the folder or file underneath.
        format: the format of its quantized layers, None in full precision.
        config: its quantization configuration, inferred from shapes where the folder has none.
        layer_names: module paths of quantized linears, in file order.
        passthrough_names: full names of all other tensors, in file order.
    """

    def __init__(self, reader: ModelReader, fmt: Format | None) -> None:
        self.reader = reader
        self.layer_names: tuple[str, ...] = ()
        self._owned: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        self.format: Format | None = None
        if fmt is not None:
            suffix = f".{fmt.marker}"
            self.layer_names = tuple(name.removesuffix(suffix) for name in reader.tensors if name.endswith(suffix))
            locals_ = ((layer, f"{layer}.{local}") for layer in self.layer_names for local in fmt.local_names)
            self._owned = {full: layer for layer, full in locals_ if full in reader.tensors}
            if not self.layer_names:
                if reader.quantization_config:
                    self.format, self.config = fmt, reader.quantization_config
                    _ = self.scheme  # the configuration may tell why
                raise CheckpointError(f"{reader.folder} has no {fmt.id} layer: no tensor is named *{suffix}")
            self.config = reader.quantization_config or self._infer(fmt)
            first = {local: reader.tensors[f"{self.layer_names[0]}.{local}"].dtype for local in self._first_locals(fmt)}
            self.format = fmt.configured(self.config).as_stored(first)
            _ = self.scheme  # a configuration that cannot be read is found on opening
        self._layers = frozenset(self.layer_names)
        self.passthrough_names = tuple(name for name in reader.tensors if name not in self._owned)

    @cached_property
    def scheme(self) -> QuantScheme | None:
        """The model-wide scheme; None in full precision."""
        if self.format is None:
            return None
        try:
            return self.format.parse_config(self.config)
        except CheckpointError as exc:
            raise CheckpointError(f"{self.reader.folder}: {exc}") from exc

    @cached_property
    def overrides(self) -> dict[str, QuantScheme]:
        """Layers whose scheme is not the model-wide one."""
        schemes = {name: self.layer_scheme(name) for name in self.layer_names}
        return {name: scheme for name, scheme in schemes.items() if scheme != self.scheme}

    def overrides_for(self, fmt: Format) -> dict[str, QuantScheme]:
        """Overrides of the layers that another format holds quantized."""
        return {name: scheme for name, scheme in self.overrides.items() if fmt.holds_module(name)}

    @cached_property
    def ignore(self) -> tuple[str, ...]:
        """Modules beside quantized layers whose matrix is not quantized, and lm_head unless it is.

        Beside means in the same list of blocks: readers quantize nothing outside of it, unless the model has parts
        other than text, with blocks of their own.
        """
        parts = "text_config" in self.reader.config
        lists = {_block_list(name) for name in self.layer_names} - {None}
        matrices = (
            name.removesuffix(".weight")
            for name in self.passthrough_names
            if name.endswith(".weight")
            and len(self.reader.tensors[name].shape) == 2
            and (_block_list(name) in lists or (parts and name.split(".")[-2] not in EMBEDDINGS))
        )
        head = () if "lm_head" in self.layer_names else ("lm_head",)
        return (*head, *matrices)

    def layer_scheme(self, name: str) -> QuantScheme:
        """Scheme of one layer, as configured."""
        with self._naming(name):
            return self._format_of(name).layer_scheme(self.config, name, self.layer_shapes(name))

    def layer_features(self, name: str) -> tuple[int, int]:
        """``(out_features, in_features)`` of one layer, from metadata."""
        scheme = self.layer_scheme(name)
        with self._naming(name):
            return self._format_of(name).features(self.layer_shapes(name), scheme)

    def layer_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's local tensors."""
        locals_ = self._format_of(name).local_names
        found = {local: self.reader.tensors.get(f"{name}.{local}") for local in locals_}
        return {local: info.shape for local, info in found.items() if info is not None}

    def layer_tensors(self, name: str) -> dict[str, Tensor]:
        """A layer's local tensors as stored."""
        return {local: self.reader.get(f"{name}.{local}") for local in self.layer_shapes(name)}

    def expect(self, name: str) -> None:
        """Has the system begin to read a layer, or another tensor, that is wanted soon; containers may not have it."""
        if not isinstance(self.reader, CheckpointReader):
            return
        for tensor in [f"{name}.{local}" for local in self.layer_shapes(name)] if name in self._layers else [name]:
            self.reader.expect(tensor)

    def layer(self, name: str) -> QuantizedLinear:
        """One layer, decoded.

        Raises:
            CheckpointError: its tensors are missing or contradict the scheme; the text names the layer.
        """
        scheme, tensors = self.layer_scheme(name), self.layer_tensors(name)
        with self._naming(name):
            return self._format_of(name).decode(tensors, scheme)

    def packed_layer(self, name: str) -> QuantizedLinear | PackedLinear:
        """One layer with its codes as the format stores them: packed in the usual stream, or else one byte each.

        Raises:
            CheckpointError: as ``layer``.
        """
        fmt = self._format_of(name)
        if not isinstance(fmt, PackedFormat):
            return self.layer(name)
        scheme, tensors = self.layer_scheme(name), self.layer_tensors(name)
        with self._naming(name):
            return fmt.decode_packed(tensors, scheme)

    def stored_weight(self, name: str, layer: QuantizedLinear, rows: slice = slice(None)) -> Tensor:
        """The weight that the format's readers compute with, fp32 ``[out, in]``.

        Args:
            name: a quantized layer.
            layer: the same, decoded.
            rows: which outputs.
        """
        fmt = self._format_of(name)
        return fmt.stored_weight(self.layer_tensors(name) if fmt.rounds_zeros else {}, layer, rows)

    def get(self, name: str) -> Tensor:
        """One tensor as stored, by its full name."""
        return self.reader.get(name)

    def dense_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the full-precision state dict, one at a time.

        Args:
            dtype: dtype of floating tensors; by default stored tensors keep theirs and dequantized weights are fp32.
        """
        suffix = None if self.format is None else f".{self.format.marker}"
        for name in self.reader.tensors:
            if name not in self._owned:
                yield name, _cast(self.reader.get(name), dtype)
            elif suffix is not None and name.endswith(suffix):
                layer = self.layer(self._owned[name])
                yield f"{self._owned[name]}.weight", _cast(self.stored_weight(self._owned[name], layer), dtype)
                if layer.bias is not None:
                    yield f"{self._owned[name]}.bias", _cast(layer.bias, dtype)

    def __enter__(self) -> Checkpoint:
        self.reader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reader.__exit__(kind, error, trace)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Adds layer and folder to what a format says about a layer's tensors."""
        try:
            yield
        except CheckpointError as exc:
            raise CheckpointError(f"layer {name} of {self.reader.folder}: {exc}") from exc

    def _first_locals(self, fmt: Format) -> Iterator[str]:
        return (local for local in fmt.local_names if f"{self.layer_names[0]}.{local}" in self._owned)

    def _infer(self, fmt: Format) -> dict[str, Any]:
        self.format = fmt
        try:
            return fmt.infer_config({name: self.layer_shapes(name) for name in self.layer_names})
        except CheckpointError as exc:
            raise CheckpointError(f"{self.reader.folder}: {exc}") from exc

    def _format_of(self, name: str) -> Format:
        if self.format is None:
            raise CheckpointError(f"{self.reader.folder} is in full precision; it has no quantized layer {name!r}")
        return self.format


def _containers(asked: Format | None) -> Iterator[Format]:
    """Formats whose container may hold a path: all of them, or the one that was asked for."""
    return iter([asked]) if asked is not None else map(get_format, available_formats())


def _other_format(reader: ModelReader, asked: Format | None) -> str | None:
    """The format that a checkpoint is labelled with, where another was asked for."""
    if asked is None:
        return None
    try:
        found = _detect(reader)
    except UnknownFormatError:
        return None
    return found.id if found is not None and found.id != asked.id else None


def _block_list(name: str) -> str | None:
    """``model.layers`` of ``model.layers.0.mlp.gate``; None outside numbered blocks."""
    found = re.match(r"(.+?)\.\d+\.", name)
    return found.group(1) if found else None


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _detect(reader: ModelReader) -> Format | None:
    config = reader.quantization_config
    for format_id in available_formats():
        fmt = get_format(format_id)
        if fmt.detect(config, reader.tensors):
            return fmt
    packed = next((name for name in reader.tensors if name.endswith(_PACKED_SUFFIXES)), None)
    if not config and packed is None:
        return None
    keys = ("quant_method", "checkpoint_format", "format")
    told = (
        ", ".join(f"{key} {config[key]!r}" for key in keys if key in config) or f"tensor {packed!r}, no configuration"
    )
    raise UnknownFormatError(
        f"{reader.folder}: no known format reads {told}; known are {', '.join(available_formats())}; "
        "if it is one of them, name it (--from)"
    )
