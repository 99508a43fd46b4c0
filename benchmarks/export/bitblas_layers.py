"""Exported layers in bitblas' own kernels: their bytes, their weights, their outputs, their time. Needs an NVIDIA GPU.

    python -m benchmarks.export.bitblas_layers [--hopper] [--json FILE]

Random layers of the reference model's shapes and of 4096 x 4096, as ``--to bitblas`` stores them.

- bytes: bitblas' ``transform_weight`` makes the same qweight from the codes.
- bitwise: outputs for unit vectors equal ``(q - z) * s`` rounded to fp16, bit for bit.
- rel err: random fp16 inputs, L2 against float64 with the same fp16 weights; ``x rounding`` divides it by what storing
  exact outputs in fp16 costs.
- us: median of CUDA graph replays, weights hot in L2, beside torch's fp16 matmul with the dequantized weight. No time
  is printed for a layer whose weights are not right.

Kernels are not tuned; ``list`` is the operator for a list of M that gptqmodel builds, ``fixed`` one for a single M.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import graph_times
from eqat_export.runtimes.bitblas import BATCHES, Kernel, build_kernels
from formats import QuantizedLinear, QuantScheme, dequantize, get_format

SCHEMES = (QuantScheme(2, 64), QuantScheme(4, 64))
SHAPES = ((512, 512), (1408, 512), (512, 1408), (4096, 4096))  # out, in
ROWS = (1, 16, 512)
PROBED = 1024
CALLS, REPLAYS = 50, 9
TITLES = ("scheme", "out x in", "M", "kernel", "bytes", "bitwise", "rel err", "x rounding", "bitblas us", "fp16 us")


def random_layer(scheme: QuantScheme, out_features: int, in_features: int) -> QuantizedLinear:
    """Uniform codes and zeros, positive fp16 scales."""
    generator = torch.Generator().manual_seed(scheme.bits)
    shape = (out_features, scheme.groups(in_features))
    codes = torch.randint(0, scheme.maxq + 1, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, scheme.maxq + 1, shape, generator=generator, dtype=torch.int32)
    return QuantizedLinear(codes, (torch.rand(shape, generator=generator) * 0.02 + 0.001).half(), zeros, scheme)


def kernel_for(layer: QuantizedLinear, batches: tuple[int, ...] | int) -> Kernel:
    """The operator for one layer."""
    scheme = layer.scheme
    return Kernel(layer.out_features, layer.in_features, f"uint{scheme.bits}", scheme.group_size, "quantized", batches)


def microseconds(call: Callable[[], object]) -> float:
    """Median over replays of a CUDA graph of many calls, for one call."""
    return graph_times([call] * CALLS, REPLAYS).p50


def wrong_weights(run: Callable[[Tensor], Tensor], weight: Tensor, width: int, rows: int) -> int:
    """How many weights differ; of a large layer, four columns of every group are probed."""
    columns = torch.arange(weight.shape[1])
    if len(columns) > PROBED:
        columns = columns[:: width // 4]
    wrong = 0
    for chunk in columns.split(rows):
        inputs = torch.zeros(rows, weight.shape[1], dtype=torch.float16)
        inputs[torch.arange(len(chunk)), chunk] = 1
        wrong += int((run(inputs.cuda())[: len(chunk)].cpu() != weight[:, chunk].T).sum())
    return wrong


def measure(layer: QuantizedLinear, operator: Callable[..., Tensor], rows: int, fixed: bool) -> dict[str, object]:
    """One row of the table."""
    stored = get_format("bitblas").encode(layer)
    arguments = [stored[name].cuda() for name in ("qweight", "scales", "qzeros")]
    weight = dequantize(layer).half()
    inputs = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows)).half().cuda()
    exact = inputs.double() @ weight.double().cuda().T
    found = operator(inputs, *arguments)
    size = torch.linalg.vector_norm(exact)
    error = float(torch.linalg.vector_norm(found.double() - exact) / size)
    rounding = float(torch.linalg.vector_norm(exact.half().double() - exact) / size)
    theirs = operator.transform_weight(layer.codes.view(torch.int8).contiguous()).cpu()  # type: ignore[attr-defined]
    probes = rows if fixed else PROBED
    wrong = wrong_weights(lambda x: operator(x, *arguments), weight, layer.scheme.width(layer.in_features), probes)
    dense = weight.cuda()
    output = torch.empty_like(found)
    return {
        "scheme": str(layer.scheme),
        "out x in": f"{layer.out_features} x {layer.in_features}",
        "M": rows,
        "kernel": "fixed" if fixed else "list",
        "bytes": "equal" if torch.equal(theirs, stored["qweight"]) else "DIFFER",
        "bitwise": "yes" if not wrong else f"{wrong} WRONG",
        "rel err": f"{error:.3g}",
        "x rounding": f"{error / rounding:.3g}",
        "bitblas us": "" if wrong else f"{microseconds(lambda: operator(inputs, *arguments, output=output)):.3g}",
        "fp16 us": f"{microseconds(lambda: torch.nn.functional.linear(inputs, dense)):.3g}",
    }


def main() -> None:
    """Builds the kernels, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hopper", action="store_true", help="build for Hopper by the workaround of bitblas_build.py")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    layers = [random_layer(scheme, *shape) for scheme in SCHEMES for shape in SHAPES]
    cases = [(layer, BATCHES, rows) for layer in layers for rows in ROWS]
    cases += [(layer, rows, rows) for layer in layers if layer.in_features == 4096 for rows in (1, 16)]
    operators = build_kernels({kernel_for(layer, batches) for layer, batches, _ in cases}, hopper=arguments.hopper)
    found = []
    print(f"| {' | '.join(TITLES)} |\n|{'---|' * len(TITLES)}")
    for layer, batches, rows in cases:
        found.append(measure(layer, operators[kernel_for(layer, batches)], rows, isinstance(batches, int)))
        print(f"| {' | '.join(str(found[-1][title]) for title in TITLES)} |", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
