"""Tiny quantized checkpoints, round-to-nearest or made of given layers, written with the package's own writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from formats import QuantizedLinear, QuantScheme, get_format, round_to_nearest
from formats.checkpoint import CheckpointReader, CheckpointWriter
from formats.model import open_checkpoint
from formats.model_writer import write_layer, write_model_config

__all__ = ["act_order_layer", "leave_out", "mix", "quantize_folder", "raw_tensors", "rewrite"]

LayerChange = Callable[[QuantizedLinear], QuantizedLinear]


def quantize_folder(
    model_folder: Path,
    out: Path,
    scheme: QuantScheme,
    *,
    format_id: str = "native",
    change: LayerChange | None = None,
    schemes: Mapping[str, QuantScheme | None] = MappingProxyType({}),
) -> Path:
    """Round-to-nearest checkpoint of a full-precision folder: every two-axis ``layers.*.weight`` is quantized,
    and others that ``schemes`` names.

    ``schemes`` has the layers that differ: module path -> scheme, or None to keep one in full precision.
    """
    fmt = get_format(format_id)
    written = scheme
    kept = [name for name, own in schemes.items() if own is None]
    kept += [] if "lm_head" in schemes else ["lm_head"]
    with CheckpointReader(model_folder) as reader, CheckpointWriter(out) as writer:
        for name in reader.tensors:
            tensor = reader.get(name)
            path = name.removesuffix(".weight")
            if tensor.dim() != 2 or path in kept or not (".layers." in name or path in schemes):
                if not _is_quantized_bias(name, reader):
                    writer.add(name, tensor)
                continue
            bias = reader.get(f"{path}.bias") if f"{path}.bias" in reader.tensors else None
            layer = round_to_nearest(tensor.float(), schemes.get(path) or scheme, bias=bias)
            layer = layer if change is None else change(layer)
            written = layer.scheme if path not in schemes else written
            write_layer(writer, fmt, path, layer)
        overrides = {name: own for name, own in schemes.items() if own is not None}
        write_model_config(writer, reader.config, fmt, written, kept, overrides=overrides)
        writer.copy_companions(model_folder)
    return out


def rewrite(checkpoint: Path, out: Path, format_id: str) -> Path:
    """The same layers in another format."""
    fmt = get_format(format_id)
    with open_checkpoint(checkpoint) as source, CheckpointWriter(out) as writer:
        for name in source.passthrough_names:
            writer.add(name, source.get(name))
        for name in source.layer_names:
            write_layer(writer, fmt, name, source.layer(name))
        assert source.scheme is not None
        write_model_config(writer, source.reader.config, fmt, source.scheme, ("lm_head",))
        writer.copy_companions(checkpoint)
    return out


def mix(base: Path, other: Path, out: Path, *names: str) -> Path:
    """The native checkpoint ``base`` with some of its layers taken from another one."""
    with open_checkpoint(base) as source, open_checkpoint(other) as second, CheckpointWriter(out) as writer:
        for name in source.layer_names:
            write_layer(writer, source.format, name, (second if name in names else source).layer(name))
        for name in source.passthrough_names:
            writer.add(name, source.get(name))
        overrides = dict.fromkeys(names, second.scheme)
        write_model_config(writer, source.reader.config, source.format, source.scheme, overrides=overrides)
        writer.copy_companions(base)
    return out


def leave_out(base: Path, out: Path, *names: str) -> Path:
    """The native checkpoint ``base`` with some of its layers in full precision."""
    with open_checkpoint(base) as source, CheckpointWriter(out) as writer:
        for name in source.layer_names:
            layer = source.layer(name)
            if name not in names:
                write_layer(writer, source.format, name, layer)
                continue
            for local, tensor in get_format("dense").encode(layer).items():
                writer.add(f"{name}.{local}", tensor)
        for name in source.passthrough_names:
            writer.add(name, source.get(name))
        write_model_config(writer, source.reader.config, source.format, source.scheme, ("lm_head", *names))
        writer.copy_companions(base)
    return out


def act_order_layer(layer: QuantizedLinear) -> QuantizedLinear:
    """The layer with its input features assigned to groups in a random order."""
    order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(3))
    return replace(layer, g_idx=layer.group_index()[order].int(), scheme=replace(layer.scheme, desc_act=True))


def raw_tensors(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Tensor name -> dtype, shape and bytes, of every shard."""
    with CheckpointReader(folder) as reader:
        return {
            name: (info.dtype, info.shape, reader.get(name).contiguous().view(torch.uint8).numpy().tobytes())
            for name, info in reader.tensors.items()
        }


def _is_quantized_bias(name: str, reader: CheckpointReader) -> bool:
    weight = name.removesuffix("bias") + "weight"
    return ".layers." in name and name.endswith(".bias") and len(reader.tensors[weight].shape) == 2
