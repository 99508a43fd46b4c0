"""Where a model's tensors lie: the two ends of a conversion.

By default both are a folder of safetensors files (``checkpoint_reader.py``, ``model_writer.py``). A format whose
readers want something else, one GGUF file or an ONNX graph, brings its own through ``Format.reads``, ``open`` and
``create``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .pieces import Choice, Header, Piece, Pieces, Place
from .safetensors_header import TensorInfo
from .types import QuantScheme

__all__ = ["Choice", "HasCompanions", "ModelReader", "ModelWriter", "PlacingWriter", "SourceModel"]


class ModelReader(Protocol):
    """A model on disk; a context manager. Tensors carry the names that transformers gives them.

    Attributes:
        folder: the folder or file.
        config: what ``config.json`` says, or would say.
        quantization_config: how it is quantized; empty if nothing tells.
        tensors: name -> TensorInfo, in file order; a quantized layer's tensors are ``{layer}.{local name}``.
    """

    folder: Path
    config: dict[str, Any]
    quantization_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU."""

    def __enter__(self) -> ModelReader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class HasCompanions(Protocol):
    """A reader whose container holds the tokenizer, too."""

    def write_companions(self, folder: Path) -> None:
        """The tokenizer as files of a Hugging Face folder."""


class SourceModel(Protocol):
    """The quantized model that a writer takes over, as far as writers look at it; ``model.Checkpoint`` is one.

    Attributes:
        reader: the container underneath.
        layer_names: module paths of quantized linears.
        passthrough_names: full names of all other tensors.
        scheme: the model-wide scheme.
        ignore: matrices beside quantized layers that are not quantized.
    """

    reader: ModelReader
    layer_names: tuple[str, ...]
    passthrough_names: tuple[str, ...]

    @property
    def scheme(self) -> QuantScheme | None: ...

    @property
    def ignore(self) -> tuple[str, ...]: ...

    def layer_scheme(self, name: str) -> QuantScheme:
        """Scheme of one layer."""

    def layer_features(self, name: str) -> tuple[int, int]:
        """``(out_features, in_features)`` of one layer."""

    def layer_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's local tensors."""

    def overrides_for(self, fmt: Any) -> dict[str, QuantScheme]:
        """Layers, among those the format holds, whose scheme is not the model-wide one."""


class ModelWriter(ABC):
    """A model being written tensor by tensor; a context manager.

    It appears complete on a clean exit, or not at all.
    """

    @abstractmethod
    def add_layer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """One quantized layer: its module path, and local name -> tensor as the format encodes it."""

    @abstractmethod
    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor that belongs to no quantized layer, by its full name."""

    @abstractmethod
    def finish(self) -> None:
        """What stands beside the tensors: configuration, tokenizer, companions. Called once, after the last tensor."""

    def choices(self) -> tuple[Choice, ...]:
        """How each tensor was stored, for containers that choose."""
        return ()

    @abstractmethod
    def __enter__(self) -> ModelWriter: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PlacingWriter(ModelWriter):
    """A writer that tells where a tensor's bytes belong, so that whoever has them can write them.

    Attributes:
        pieces: what becomes of a tensor on its way into the container.
    """

    pieces: Pieces

    @abstractmethod
    def reserve(self, header: Header) -> Place:
        """Room for a tensor: the next in the container, in a file that is there already.

        Raises:
            CheckpointError: the container does not expect it, or not once more.
        """

    @abstractmethod
    def put(self, piece: Piece) -> None:
        """Reserves room for a tensor and writes it."""

    def add_layer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """See ModelWriter."""
        for piece in self.pieces.of_layer(name, tensors):
            self.put(piece)

    def add(self, name: str, tensor: Tensor) -> None:
        """See ModelWriter."""
        for piece in self.pieces.of_tensor(name, tensor):
            self.put(piece)
