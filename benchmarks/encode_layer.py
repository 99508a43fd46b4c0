"""Time to encode one 4096 x 4096 layer as GPTQ v2, beside gptqmodel's own packer on the same layer in the same run.

    python benchmarks/encode_layer.py [--csv FILE] [--repeats N]

The bytes of both are compared first; nothing is timed when they differ. Needs the extra ``gptq``.
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # gptqmodel compiles its dequantization otherwise

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gptqmodel
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT

from formats import QuantizedLinear, QuantScheme, dequantize, get_format

SIZE, GROUP = 4096, 64
FIELDS = ("bits", "who", "p20_ms", "p50_ms", "p80_ms", "threads", "cpu", "torch", "gptqmodel")


def random_layer(bits: int) -> QuantizedLinear:
    """Codes and zeros uniform over their range, positive fp16 scales."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (SIZE, SIZE), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (SIZE, SIZE // GROUP), generator=generator, dtype=torch.int32)
    scales = (torch.rand(SIZE, SIZE // GROUP, generator=generator) + 0.5).half()
    return QuantizedLinear(codes, scales, zeros, QuantScheme(bits, GROUP))


def gptqmodel_packer(layer: QuantizedLinear) -> tuple[TorchLinear, Callable[[], None]]:
    """gptqmodel's module, and a call that packs the layer's weights into it."""
    module = TorchLinear(
        bits=layer.scheme.bits, group_size=GROUP, sym=False, desc_act=False, in_features=SIZE, out_features=SIZE,
        bias=False, pack_dtype=torch.int32, register_buffers=True, format=FORMAT.GPTQ_V2,
    )  # fmt: skip
    linear = torch.nn.Linear(SIZE, SIZE, bias=False)
    linear.weight.data = dequantize(layer)
    scales, zeros, index = layer.scales.float(), layer.zeros.float(), layer.group_index().int()
    return module, lambda: module.pack_original(linear, scales, zeros, index)


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Sorted wall times after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return sorted(times)


def main() -> None:
    """Checks, times, prints, and appends rows to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="append the rows here")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    fmt = get_format("gptq_v2")
    rows = []
    for bits in (2, 3, 4, 8):
        layer = random_layer(bits)
        module, pack = gptqmodel_packer(layer)
        pack()
        ours = fmt.encode(layer)
        for name in ("qweight", "qzeros"):
            if not torch.equal(ours[name], getattr(module, name)):
                sys.exit(f"{bits} bits: {name} differs from gptqmodel's; nothing was timed")
        for who, call in (("eqat", lambda: fmt.encode(layer)), ("gptqmodel", pack)):  # noqa: B023  (called at once)
            times = milliseconds(call, arguments.repeats)
            quantiles = [statistics.quantiles(times, n=10)[i] for i in (1, 4, 7)]
            rows.append(
                (bits, who, *(f"{value:.1f}" for value in quantiles), torch.get_num_threads(), platform.machine(),
                 torch.__version__, gptqmodel.__version__)
            )  # fmt: skip
            print(*rows[-1], sep="\t", flush=True)
    if arguments.csv:
        fresh = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([FIELDS, *rows] if fresh else rows)


if __name__ == "__main__":
    main()
