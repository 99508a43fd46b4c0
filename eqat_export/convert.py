"""Conversion of a quantized checkpoint to another format, one layer at a time.

Every layer goes source bytes -> canonical layer -> target bytes, so nothing is ever re-quantized, and peak memory is
that of the largest layer whatever the model's size. Codes stay packed where both sides store the same bit stream. All
layers are checked against the target from metadata alone before anything is written. Tensors that belong to no
quantized layer keep their bytes and dtype unless the format says otherwise (``dense`` is one dtype throughout).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_export.tensors import dtype_name
from formats import available_formats, get_format
from formats.affine import dequantize
from formats.base import Exactness, Format, PackedFormat
from formats.container import Choice, ModelWriter
from formats.dense import DenseFormat
from formats.errors import CheckpointError, EqatError, InputError, UnsupportedSchemeError
from formats.model import Checkpoint, open_checkpoint
from formats.model_writer import create_model, encode_layer, write_layer
from formats.packed import PackedLinear
from formats.types import QuantizedLinear, QuantScheme

__all__ = ["Conversion", "Rounding", "convert"]


@dataclass
class Rounding:
    """What rounding did to the weights of the layers, or values of the tensors, that could not be held exactly.

    Attributes:
        tensors: how many were rounded.
        error: largest absolute difference.
        relative: largest ``|difference| / |value|`` over non-zero values.
        bound: the format's bound where ``error`` was found.
        where: name of the layer or tensor it was found in.
    """

    tensors: int = 0
    error: float = 0.0
    relative: float = 0.0
    bound: float = 0.0
    where: str = ""

    def add(self, name: str, exact: Tensor, stored: Tensor, bound: Tensor) -> None:
        """Takes the differences of one tensor, or of some rows of it, into account.

        Raises:
            CheckpointError: a stored value is further off than its bound, or not finite.
        """
        difference = (stored.float() - exact).abs_()
        within = difference <= bound  # false for NaN
        if not bool(within.all()):
            value = float(exact[~within].flatten()[0])
            raise CheckpointError(
                f"{name}: the value {value:.6g} cannot be stored as {dtype_name(stored.dtype)}; try another --dtype"
            )
        share = (difference / exact).abs_().nan_to_num_(0.0, posinf=0.0)  # over non-zero values
        self.relative = max(self.relative, float(share.max()))
        worst = int(difference.argmax())
        if float(difference.flatten()[worst]) >= self.error:
            self.error = float(difference.flatten()[worst])
            self.bound = float(bound.expand_as(difference).flatten()[worst])
            self.where = name

    def add_groups(self, name: str, error: Tensor, scales: Tensor) -> None:
        """Takes groups into account whose weights are all off by the same.

        Args:
            name: their layer.
            error: float64 ``[out, groups]``.
            scales: ``[out, groups]``; no weight but zero is smaller.
        """
        worst = float(error.max())
        if worst > self.error:
            self.error, self.bound, self.where = worst, worst, name
        share = (error / scales.double().abs()).nan_to_num_(0.0, posinf=0.0)
        self.relative = max(self.relative, float(share.max()))


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        exactness: exactness class of every layer written.
        rounded: layers whose weights were rounded.
        read: layers whose source stores zero-points as rounded products; what taking whole ones costs.
        casts: biases and passthrough tensors whose cast was not exact.
        weights: parameters inside quantized layers.
        layer_bytes: bytes that the layers take in the output.
        total_bytes: bytes of all tensors in the output.
        choices: how each tensor was stored, where the container has several ways.
    """

    source: Path
    out: Path
    source_format: str
    target_format: str
    scheme: QuantScheme
    layers: int
    exactness: Counter[Exactness] = field(default_factory=Counter)
    rounded: Rounding = field(default_factory=Rounding)
    read: Rounding = field(default_factory=Rounding)
    casts: Rounding = field(default_factory=Rounding)
    weights: int = 0
    layer_bytes: int = 0
    total_bytes: int = 0
    choices: tuple[Choice, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of a quantized layer takes in the output, everything stored with it included."""
        return 8 * self.layer_bytes / self.weights

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "source": str(self.source),
            "out": str(self.out),
            "source_format": self.source_format,
            "format": self.target_format,
            "bits": self.scheme.bits,
            "group_size": self.scheme.group_size,
            "layers": self.layers,
            "exactness": {kind.value: count for kind, count in self.exactness.items()},
            "rounded": vars(self.rounded),
            "read": vars(self.read),
            "casts": vars(self.casts),
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.total_bytes,
            "choices": [vars(choice) for choice in self.choices],
        }


def convert(
    source: Path,
    out: Path,
    target: str,
    *,
    source_format: str | None = None,
    options: Mapping[str, str] | None = None,
    shard_size: int = 5 * 10**9,
    force: bool = False,
    start: Callable[[int], Callable[[str], None]] = lambda total: lambda name: None,
) -> Conversion:
    """Writes the checkpoint ``source`` to ``out`` in another format.

    Args:
        source: a quantized checkpoint in any known format.
        out: output folder; it appears complete or not at all.
        target: format id.
        source_format: read ``source`` as this format instead of detecting it.
        options: what the target format's constructor takes (``Format.options``).
        shard_size: bytes of a file.
        force: replace an existing checkpoint at ``out``.
        start: called with the number of tensors to write; returns what is called with each layer's name when done.

    Raises:
        EqatError: the source cannot be read, the target cannot hold a layer, or the output exists.
    """
    form = get_format(target, **(options or {}))
    with open_checkpoint(source, source_format) as checkpoint:
        if checkpoint.format is None or checkpoint.scheme is None:
            raise InputError(
                f"{source} is a full-precision model, and export converts quantized ones: eqat train {source}"
            )
        _check_output(source, out)
        try:
            writer = create_model(form, out, checkpoint, shard_size=shard_size, force=force)
            check_layers(checkpoint, form)
        except UnsupportedSchemeError as error:
            raise _with_ways_out(error, checkpoint, out) from error
        result = Conversion(source, out, checkpoint.format.id, form.id, checkpoint.scheme, len(checkpoint.layer_names))
        with writer:
            step = start(len(checkpoint.layer_names))
            for name in checkpoint.layer_names:
                _write_layer(writer, checkpoint, form, name, result)
                step(name)
            for name in checkpoint.passthrough_names:
                _write_tensor(writer, checkpoint, name, form.passthrough_dtype(), result)
            writer.finish()
        result.choices = writer.choices()
    return result


def check_layers(checkpoint: Checkpoint, form: Format) -> None:
    """Checks every layer against a format, from metadata only.

    Raises:
        UnsupportedSchemeError: the first layer that the format cannot hold, by name, or cannot hold beside the others.
    """
    for name in checkpoint.layer_names:
        if not form.holds_module(name):
            continue
        try:
            form.check(checkpoint.layer_scheme(name), *checkpoint.layer_features(name))
        except UnsupportedSchemeError as error:
            raise error.at(f"layer {name}") from error
    if checkpoint.scheme is not None:  # some formats have no words for layers that differ
        form.quantization_config(checkpoint.scheme, checkpoint.ignore, checkpoint.overrides_for(form))


def _with_ways_out(error: UnsupportedSchemeError, checkpoint: Checkpoint, out: Path) -> UnsupportedSchemeError:
    """A refusal that names the formats that hold every layer, and suggests no other."""
    source = checkpoint.format.id if checkpoint.format else None
    others = (get_format(name) for name in available_formats() if name != source)
    holding = [form.id for form in others if _holds_all(checkpoint, form, out)]
    narrowed = UnsupportedSchemeError(error.reason, instead=[name for name in error.instead if name in holding])
    return UnsupportedSchemeError(f"{narrowed} (formats that hold every layer: {', '.join(holding) or 'none'})")


def _holds_all(checkpoint: Checkpoint, form: Format, out: Path) -> bool:
    """True when a conversion is certain not to be refused; dense, which always holds the weights, aside."""
    schemes = {checkpoint.layer_scheme(name) for name in checkpoint.layer_names if form.holds_module(name)}
    if not form.readable or any(map(form.depends_on_values, schemes)):
        return False
    try:
        create_model(form, out.with_name(f".{out.name}.{secrets.token_hex(4)}"), checkpoint)  # writes nothing yet
        check_layers(checkpoint, form)
    except EqatError:
        return False
    return True


def _write_layer(writer: ModelWriter, checkpoint: Checkpoint, form: Format, name: str, result: Conversion) -> None:
    layer = _as_configured(checkpoint, name)
    if checkpoint.format is not None and checkpoint.format.rounds_zeros:
        _measure_reading(checkpoint, checkpoint.format, name, layer, result.read)
    if form.holds_module(name):
        stored = write_layer(writer, form, name, layer)
        result.weights += layer.out_features * layer.in_features
        result.layer_bytes += sum(tensor.nbytes for tensor in stored.values())
    else:  # ordinary weights, in the dtype of the scales
        form = DenseFormat(layer.scales.dtype)
        stored = encode_layer(form, name, layer)
        for local, tensor in stored.items():
            writer.add(f"{name}.{local}", tensor)
    if layer.bias is not None and "bias" in stored:
        _measure_cast(f"{name}.bias", layer.bias, stored["bias"], result.casts)
    result.exactness[_measure(form, name, layer, stored, result.rounded)] += 1
    result.total_bytes += sum(tensor.nbytes for tensor in stored.values())


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
    for rows, part in plain.row_blocks():
        exact, decoded = source.stored_weight(tensors, plain, rows), dequantize(part)
        if not torch.equal(exact, decoded):
            rounding.add(name, exact, decoded, (decoded - exact).abs())  # decoding has set the limit already
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
    if isinstance(layer, PackedLinear) and (isinstance(form, PackedFormat) or form.takes_packed):
        kind = form.exactness(layer)  # from scales and zeros alone
        if kind is not Exactness.ROUNDED:
            return kind
        if isinstance(form, PackedFormat) and form.rounds_zeros:
            packed = form.decode_packed(stored, layer.scheme)
            error = form.zero_error(stored, packed)
            if error is not None and torch.equal(packed.scales.double().abs(), layer.scales.double().abs()):
                rounding.add_groups(name, error, packed.scales)
                rounding.tensors += 1
                return kind
    plain = layer.unpack()
    kind = max((form.exactness(part) for _, part in plain.row_blocks()), key=list(Exactness).index)
    if kind is Exactness.ROUNDED:
        held = form.decode(stored, layer.scheme) if form.readable else None
        for rows, part in plain.row_blocks():
            found = stored[form.marker][rows] if held is None else form.stored_weight(stored, held, rows)
            rounding.add(name, dequantize(part), found, form.bound(part))
        rounding.tensors += 1
    return kind


def _write_tensor(
    writer: ModelWriter, checkpoint: Checkpoint, name: str, dtype: torch.dtype | None, result: Conversion
) -> None:
    tensor = checkpoint.get(name)
    if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
        cast = tensor.to(dtype)
        _measure_cast(name, tensor, cast, result.casts)
        tensor = cast
    writer.add(name, tensor)
    result.total_bytes += tensor.nbytes


def _measure_cast(name: str, tensor: Tensor, cast: Tensor, casts: Rounding) -> None:
    if torch.equal(cast.to(tensor.dtype), tensor):
        return
    limits = torch.finfo(cast.dtype)
    exact = tensor.float()
    # half a unit in the last place, and half the smallest subnormal number
    casts.add(name, exact, cast, exact.abs() * (limits.eps / 2) + limits.smallest_normal * limits.eps / 2)
    casts.tensors += 1


def _check_output(source: Path, out: Path) -> None:
    inside, outside = source.resolve(), out.resolve()
    if inside == outside or outside in inside.parents:
        raise InputError(f"--out {out} is or contains the checkpoint {source}; choose another folder")
