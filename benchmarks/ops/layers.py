"""Random layers for the packed ops' benchmarks, as each library takes them. Copies lie beside each other in memory."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eqat_train.ops.packed import PackedWeight
from formats import QuantizedLinear, QuantScheme, get_format
from formats.checkpoint import CheckpointWriter
from formats.model import open_checkpoint
from formats.model_writer import write_layer, write_model_config

__all__ = ["bitblas_calls", "exact_weight", "humming_calls", "packed_copies", "random_layer"]

Call = Callable[[Tensor], Tensor]


def random_layer(bits: int, group_size: int, out_features: int, in_features: int) -> QuantizedLinear:
    """Uniform codes and zero-points, positive fp16 scales."""
    generator = torch.Generator().manual_seed(bits)
    scheme = QuantScheme(bits, group_size)
    shape = (out_features, scheme.groups(in_features))
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int32)
    return QuantizedLinear(codes, (torch.rand(shape, generator=generator) * 0.02 + 0.001).half(), zeros, scheme)


def exact_weight(layer: QuantizedLinear) -> Tensor:
    """``(q - z) * s`` in float64 on the GPU, ``[out, in]``."""
    width = layer.scheme.width(layer.in_features)
    codes, zeros, scales = layer.codes.cuda(), layer.zeros.cuda(), layer.scales.cuda().double()
    centered = codes.double().unflatten(1, (-1, width)) - zeros.double().unsqueeze(2)
    return centered.mul_(scales.unsqueeze(2)).flatten(1)


def packed_copies(layer: QuantizedLinear, count: int) -> list[tuple[PackedWeight, Tensor]]:
    """The layer as our ops take it, with scales as stored."""
    tensors = get_format("native").encode(layer)
    packed = PackedWeight(
        tensors["qweight"].cuda(),
        tensors["qzeros"].cuda(),
        layer.scheme.bits,
        layer.scheme.group_size,
        layer.in_features,
    )
    scales = layer.scales.t().contiguous().cuda()
    return [
        (replace(packed, qweight=packed.qweight.clone(), qzeros=packed.qzeros.clone()), scales.clone())
        for _ in range(count)
    ]


def humming_calls(layer: QuantizedLinear, count: int) -> list[Call]:
    """The layer in humming-kernels, read from a compressed-tensors export of it."""
    from eqat_export.convert import convert  # noqa: PLC0415
    from eqat_export.runtimes.humming import HummingSession  # noqa: PLC0415

    name, native = "model.layers.0.mlp.up_proj", get_format("native")
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "native", Path(folder) / "export"
        with CheckpointWriter(source) as writer:
            writer.add("model.embed_tokens.weight", torch.zeros(8, 8, dtype=torch.float16))
            write_layer(writer, native, name, layer)
            write_model_config(writer, {"model_type": "llama", "dtype": "float16"}, native, layer.scheme)
        convert(source, out, "compressed-tensors")
        with open_checkpoint(out) as checkpoint:
            call = HummingSession(checkpoint, torch.device("cuda")).layer(name)
    return [copy.deepcopy(call) for _ in range(count)]


def bitblas_calls(layer: QuantizedLinear, count: int, rows: int) -> list[Call]:
    """The layer in bitblas' kernel for so many rows, not tuned."""
    from eqat_export.runtimes.bitblas import Kernel, build_kernels  # noqa: PLC0415

    scheme = layer.scheme
    kernel = Kernel(layer.out_features, layer.in_features, f"uint{scheme.bits}", scheme.group_size, "quantized", rows)
    operator = build_kernels({kernel}, hopper=True)[kernel]
    stored = get_format("bitblas").encode(layer)
    arguments = [stored[key].cuda() for key in ("qweight", "scales", "qzeros")]
    output = torch.empty(rows, layer.out_features, dtype=torch.float16, device="cuda")

    def call(copies: list[Tensor]) -> Call:
        return lambda x: operator(x, *copies, output=output)

    return [call([tensor.clone() for tensor in arguments]) for _ in range(count)]
