"""What a storage format is.

A format maps one canonical layer to local tensor names and back. It owns the layout of those tensors, the
configuration its readers expect, and the statement of what it can hold. It never touches files: that is a container's
work (``container.py``), and shifting bits is ``packing``'s.

A subclass writes ``check``, ``encode``, ``decode``, ``features``, ``quantization_config`` and ``parse_config``; the
rest has defaults. ``encode`` refuses whatever ``check`` refuses. A layout that stores the usual bit stream is a
PackedFormat and writes ``encode_packed`` and ``decode_packed`` instead.

Exactness of ``decode(encode(layer))``:

- ``EXACT``: codes, zeros and scales come back bit for bit.
- ``EXACT_WEIGHTS``: another parametrisation of the same numbers; dequantized fp32 weights are equal, bit for bit but
  for the sign of a zero.
- ``ROUNDED``: the weights differ by at most ``bound(layer)``, and the class says where that comes from.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .affine import dequantize
from .container import ModelReader, ModelWriter, SourceModel
from .errors import CheckpointError
from .packed import PackedLinear
from .pieces import Pieces
from .types import GroupedLayer, QuantizedLinear, QuantScheme

__all__ = ["NO_OVERRIDES", "EncodedLayer", "Exactness", "Format", "FormatOption", "PackedFormat"]

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
NO_OVERRIDES: Mapping[str, QuantScheme] = MappingProxyType({})


class Exactness(enum.Enum):
    """How faithfully a format holds a layer."""

    EXACT = "exact"
    EXACT_WEIGHTS = "exact weights"
    ROUNDED = "rounded"


@dataclass(frozen=True)
class FormatOption:
    """One choice that a format leaves to whoever exports.

    Attributes:
        name: as typed after ``--``; the format's constructor takes it with underscores, as a string.
        choices: allowed values; empty when any text will do.
        default: what it is when nothing is said; None when the format then decides by itself.
        help: one line.
    """

    name: str
    choices: tuple[str, ...]
    default: str | None
    help: str


class EncodedLayer(dict[str, Tensor]):
    """A layer's tensors by local name, with what encoding found out about the layer on its way.

    Attributes:
        exactness: how faithfully it is held; None where nothing was found out, and ``Format.exactness`` tells.
        group_error: ``[out, groups]``, by how much all weights of a group are off alike; None where they are not.
    """

    exactness: Exactness | None = None
    group_error: Tensor | None = None


class Format(ABC):
    """One storage layout of a quantized linear layer.

    Class attributes:
        id: the name users type.
        title: one line for ``eqat formats``.
        marker: local name of the tensor whose presence marks a quantized layer, e.g. ``"qweight"``.
        local_names: every local tensor name a layer may have; anything else beside a layer is passed through.
        readable: False for layouts that cannot be decoded to codes (dense weights).
        rounds_zeros: True where zero-points are stored as products with the scale, which may be rounded:
            ``stored_weight`` is then not always ``(q - z) * s``.
        embeddings: True where readers take a quantized token embedding; elsewhere it is written as ordinary weights.
        config_keys: keys of ``config.json`` that hold the quantization configuration.
        options: what the constructor takes.
        takes_packed: True where ``encode`` takes a PackedLinear as well, because unpacking can be spared.
        suffix: how names of the format's own files end, e.g. ``.gguf``; empty where a model is a folder.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    marker: ClassVar[str]
    local_names: ClassVar[tuple[str, ...]]
    readable: ClassVar[bool] = True
    rounds_zeros: ClassVar[bool] = False
    embeddings: ClassVar[bool] = False
    config_keys: ClassVar[tuple[str, ...]] = ("quantization_config",)
    options: ClassVar[tuple[FormatOption, ...]] = ()
    takes_packed: ClassVar[bool] = False
    suffix: ClassVar[str] = ""

    @abstractmethod
    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """Raises UnsupportedSchemeError, naming value, allowed and way out, if the layer cannot be held."""

    def depends_on_values(self, scheme: QuantScheme) -> bool:
        """True where ``encode`` may refuse a layer that ``check`` accepts, for its integers."""
        return False

    def holds_module(self, name: str) -> bool:
        """True unless it is a token embedding and this format's readers take those as ordinary weights only."""
        return self.embeddings or name.rpartition(".")[2] not in EMBEDDINGS

    @abstractmethod
    def encode(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        """Local tensor name -> tensor, contiguous, exactly as stored."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedLinear:
        """The canonical layer from local tensors.

        ``scheme`` is what the configuration says, or the scheme of the layer just encoded; the returned layer's scheme
        is what the tensors really hold (``sym`` and ``desc_act`` follow the values).

        Raises:
            CheckpointError: tensors that are missing, of a wrong shape or dtype, or contradict the scheme.
        """

    @abstractmethod
    def features(self, shapes: Mapping[str, tuple[int, ...]], scheme: QuantScheme) -> tuple[int, int]:
        """``(out_features, in_features)`` of a layer from its local tensors' shapes.

        Raises:
            CheckpointError: a needed tensor is missing or is not two-dimensional.
        """

    @abstractmethod
    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """The ``quantization_config`` object for ``config.json``.

        Args:
            scheme: the model-wide scheme.
            ignore: module paths of linears kept in full precision.
            overrides: module path -> scheme of each layer whose scheme is another one.
        """

    @abstractmethod
    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """The model-wide scheme from a quantization configuration.

        Raises:
            CheckpointError: a field is missing or holds a value the format does not know.
        """

    def sidecar_files(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, dict[str, Any]]:
        """Further JSON files readers look for, file name -> object (e.g. ``quantize_config.json``)."""
        return {}

    def model_dtype(self) -> torch.dtype | None:
        """The dtype ``config.json`` has to name for readers to take the tensors as stored; None keeps the source's."""
        return None

    def adapted_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The source's ``config.json``, without its quantization, as this format's readers need it."""
        return dict(config)

    def passthrough_dtype(self) -> torch.dtype | None:
        """The dtype that tensors of no quantized layer are cast to; None keeps each one's own."""
        return None

    def detect(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """True when a checkpoint with this quantization configuration and these tensor names is in this format."""
        return False

    def infer_config(self, layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Any]:
        """The quantization configuration of a checkpoint that has none, from its layers' local shapes.

        Raises:
            CheckpointError: the format always has a configuration, or the shapes leave it open.
        """
        raise CheckpointError(f"no quantization configuration; {self.id} checkpoints need one")

    def configured(self, config: Mapping[str, Any]) -> Format:
        """This format as the producer named in ``config`` writes it."""
        return self

    def as_stored(self, dtypes: Mapping[str, torch.dtype]) -> Format:
        """This format with the options that a checkpoint was written with, as its first layer's local dtypes tell."""
        return self

    def layer_scheme(self, config: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]]) -> QuantScheme:
        """Scheme of one layer: ``name`` is its module path, ``shapes`` its local tensors' shapes."""
        return self.parse_config(config)

    def stored_weight(self, tensors: Mapping[str, Tensor], layer: QuantizedLinear, rows: slice = slice(None)) -> Tensor:
        """The weight that readers compute from local tensors, fp32 ``[out, in]``.

        Args:
            tensors: a layer as stored.
            layer: the same, decoded.
            rows: which outputs.
        """
        return dequantize(layer.rows(rows))

    def zero_error(self, tensors: Mapping[str, Tensor], layer: GroupedLayer) -> Tensor | None:
        """How far each group's ``stored_weight`` is from ``(q - z) * s``, whatever its codes.

        Args:
            tensors: a layer as stored.
            layer: the same, decoded.

        Returns:
            float64 ``[out, groups]``; None where it depends on the codes as well.
        """
        return None

    def reads(self, path: Path) -> bool:
        """True for a path that this format's own container opens; safetensors folders need no claim."""
        return False

    def open(self, path: Path) -> ModelReader:
        """The container behind a path that ``reads`` claims."""
        raise NotImplementedError(f"{self.id} claims {path} and has no reader for it")

    def create(self, out: Path, source: SourceModel, *, shard_size: int, force: bool) -> ModelWriter | None:
        """A writer for a conversion of ``source`` to ``out``; None where a safetensors folder is what readers want."""
        return None

    def pieces(self, source: SourceModel) -> Pieces:
        """What becomes of this format's tensors in the container that ``create`` makes of ``source``."""
        return Pieces()

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """How faithfully this layer, with its scheme and scale dtype, is held."""
        return Exactness.EXACT

    def exact_option(self) -> str | None:
        """The export option that holds more layers exactly than these options do; None where there is none."""
        return None

    def bound(self, layer: QuantizedLinear) -> Tensor:
        """Largest |stored weight - weight| for each weight, fp32, broadcastable to ``[out, in]``."""
        return torch.zeros(1, 1)


class PackedFormat(Format):
    """A layout whose integers are the stream of PackedLinear, perhaps transposed or with its words permuted."""

    @abstractmethod
    def encode_packed(self, layer: PackedLinear) -> dict[str, Tensor]:
        """Like ``encode``, which has already called ``check``."""

    @abstractmethod
    def decode_packed(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> PackedLinear:
        """Like ``decode``."""

    def encode(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        """Packs the codes, then ``encode_packed``.

        Raises:
            UnsupportedSchemeError: what ``check`` refuses, or values that the stored dtype cannot hold.
        """
        self.check(layer.scheme, layer.out_features, layer.in_features)
        return self.encode_packed(PackedLinear.pack(layer))

    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedLinear:
        """``decode_packed``, then unpacks the codes."""
        return self.decode_packed(tensors, scheme).unpack()
