"""One part of a model, a layer or another tensor, from source bytes to target bytes, with what that cost.

Nothing here is shared between parts, so that several can be encoded at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eqat_export.code_rounding import measure_codes
from eqat_export.rounding import Rounding
from formats.affine import dequantize
from formats.atomic_output import writing
from formats.base import EncodedLayer, Exactness, Format, PackedFormat
from formats.checkpoint_reader import CheckpointReader
from formats.dense import DenseFormat
from formats.errors import CheckpointError
from formats.model import Checkpoint
from formats.model_writer import encode_layer
from formats.packed import PackedLinear
from formats.pieces import Piece, Pieces, write_bytes
from formats.types import QuantizedLinear
from formats.writeback import Writeback

__all__ = ["EncodedPart", "PartReport", "copy_tensor", "encode_part", "layer_memory", "passed_through"]

# Upper estimates of what a weight takes while its layer is being encoded: packed, its words before and after; unpacked,
# a byte a code and what becomes of it besides.
_PACKED_BYTES, _UNPACKED_BYTES = 2, 6


@dataclass
class PartReport:
    """What writing a layer or a tensor did.

    Attributes:
        name: the layer's module path, or the tensor's full name.
        exactness: of a layer; None for a tensor of no quantized layer.
        in_format: True for a layer in the target format, False for ordinary weights.
        weights: parameters of a layer in the target format.
        nbytes: bytes of its tensors.
        rounded, read, casts: as in Conversion.
    """

    name: str
    exactness: Exactness | None = None
    in_format: bool = False
    weights: int = 0
    nbytes: int = 0
    rounded: Rounding = field(default_factory=Rounding)
    read: Rounding = field(default_factory=Rounding)
    casts: Rounding = field(default_factory=Rounding)


@dataclass
class EncodedPart(PartReport):
    """A layer or a tensor as it will be written.

    Attributes:
        tensors: local names for a layer in the target format; full names otherwise.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def measured(self) -> EncodedPart:
        """With the bytes that its tensors take."""
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        return self

    def pieces(self, pieces: Pieces) -> list[Piece]:
        """As a container stores it."""
        if self.in_format:
            return pieces.of_layer(self.name, self.tensors)
        return [piece for name, tensor in self.tensors.items() for piece in pieces.of_tensor(name, tensor)]


def layer_memory(checkpoint: Checkpoint, form: Format, name: str) -> int:
    """About how many bytes of memory encoding a layer takes, its result included."""
    rows, columns = checkpoint.layer_features(name)
    packed = isinstance(checkpoint.format, PackedFormat) and (isinstance(form, PackedFormat) or form.takes_packed)
    return rows * columns * (_PACKED_BYTES if packed else _UNPACKED_BYTES)


def encode_part(checkpoint: Checkpoint, form: Format, name: str) -> EncodedPart:
    """Reads a layer, encodes it, and measures what was rounded.

    Raises:
        EqatError: it cannot be read, or the format cannot hold it.
    """
    layer = _as_configured(checkpoint, name)
    in_format = form.holds_module(name)
    if not in_format:  # ordinary weights, in the dtype of the scales
        form = DenseFormat(layer.scales.dtype)
    if not isinstance(form, PackedFormat) and not form.takes_packed:
        layer = layer.unpack()  # once, for encoding and for measuring
    stored = encode_layer(form, name, layer)
    part = EncodedPart(name, in_format=in_format, tensors=stored)
    if checkpoint.format is not None and checkpoint.format.rounds_zeros:
        _measure_reading(checkpoint, checkpoint.format, name, layer, part.read)
    if layer.bias is not None and "bias" in stored:
        part.casts.add_cast(f"{name}.bias", layer.bias, stored["bias"])
    part.exactness = _measure(form, name, layer, stored, part.rounded)
    if in_format:
        part.weights = layer.out_features * layer.in_features
    else:
        part.tensors = {f"{name}.{local}": tensor for local, tensor in stored.items()}
    return part.measured()


def passed_through(checkpoint: Checkpoint, form: Format, name: str) -> EncodedPart:
    """A tensor of no quantized layer, in the dtype that the format wants.

    Raises:
        EqatError: it cannot be read, or a value is beyond that dtype's range.
    """
    tensor, dtype = checkpoint.get(name), form.passthrough_dtype()
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return EncodedPart(name, tensors={name: tensor}).measured()
    part = EncodedPart(name, tensors={name: tensor.to(dtype)})
    part.casts.add_cast(name, tensor, part.tensors[name])
    return part.measured()


def copy_tensor(checkpoint: Checkpoint, name: str, file: int, offset: int, out: Path) -> None:
    """Copies a tensor's bytes as they are, a few at a time.

    Args:
        checkpoint: a folder of safetensors files.
        name: the tensor's full name.
        file: descriptor, open for writing.
        offset: where its bytes begin there.
        out: the output, for messages.

    Raises:
        CheckpointError: it cannot be read or written.
    """
    if not isinstance(checkpoint.reader, CheckpointReader):
        raise CheckpointError(f"{checkpoint.reader.folder} is no folder of safetensors files")
    writeback = Writeback(file)
    for start, part in checkpoint.reader.chunks(name):
        with writing(out):
            write_bytes(file, offset + start, part)
        writeback.begin(offset + start, len(part))


def _measure_reading(
    checkpoint: Checkpoint, source: Format, name: str, layer: QuantizedLinear | PackedLinear, rounding: Rounding
) -> None:
    """Adds how far a layer's decoded weight is from the one that its own readers compute with."""
    tensors, differs = checkpoint.layer_tensors(name), False
    error = source.zero_error(tensors, layer)
    if error is not None:
        if bool((error > 0).any()):
            rounding.add_groups(name, error, layer.scales)
            rounding.tensors += 1
        return
    plain = layer.unpack()
    for rows, part in plain.row_blocks(2**17):
        exact, decoded = source.stored_weight(tensors, plain, rows), dequantize(part)
        if not torch.equal(exact, decoded):
            rounding.add(name, exact, decoded, partial(_row_difference, exact, decoded))  # decoding set the limit
            differs = True
    rounding.tensors += differs


def _as_configured(checkpoint: Checkpoint, name: str) -> QuantizedLinear | PackedLinear:
    """A layer that is symmetric exactly when the configuration, which is carried over, says so.

    Raises:
        CheckpointError: it says so, and zero-points differ.
    """
    layer, scheme = checkpoint.packed_layer(name), checkpoint.layer_scheme(name)
    if scheme.sym and not layer.scheme.sym:
        low, high = (int(bound) for bound in layer.zeros.aminmax())
        raise CheckpointError(
            f"layer {name} of {checkpoint.reader.folder}: the configuration says sym, and zero-points span "
            f"{low}..{high}; one of the two is wrong: eqat verify {checkpoint.reader.folder}"
        )
    return layer if layer.scheme.sym == scheme.sym else replace(layer, scheme=replace(layer.scheme, sym=scheme.sym))


def _measure(
    form: Format, name: str, layer: QuantizedLinear | PackedLinear, stored: Mapping[str, Tensor], rounding: Rounding
) -> Exactness:
    """How exactly a layer was held; what was rounded is added to ``rounding``. A few rows at a time."""
    known = stored if isinstance(stored, EncodedLayer) else EncodedLayer()
    kind = known.exactness
    if kind is None and isinstance(layer, PackedLinear) and (isinstance(form, PackedFormat) or form.takes_packed):
        kind = form.exactness(layer)  # from scales and zeros alone
    if kind is not None and kind is not Exactness.ROUNDED:
        return kind
    if known.group_error is not None:
        rounding.add_groups(name, known.group_error, layer.scales)
        rounding.tensors += 1
        return Exactness.ROUNDED
    if kind is not None and isinstance(form, DenseFormat) and measure_codes(form, name, layer, form.dtype, rounding):
        return kind
    plain = layer.unpack()
    if kind is None:
        kind = max((form.exactness(part) for _, part in plain.row_blocks()), key=list(Exactness).index)
    if kind is Exactness.ROUNDED:
        held = form.decode(stored, layer.scheme) if form.readable else None
        for rows, part in plain.row_blocks(2**17):
            found = stored[form.marker][rows] if held is None else form.stored_weight(stored, held, rows)
            rounding.add(name, dequantize(part), found, partial(_row_bound, form, part))
        rounding.tensors += 1
    return kind


def _row_bound(form: Format, layer: QuantizedLinear, row: int) -> Tensor:
    return form.bound(layer.rows(slice(row, row + 1)))


def _row_difference(exact: Tensor, decoded: Tensor, row: int) -> Tensor:
    return (decoded[row] - exact[row]).abs()
