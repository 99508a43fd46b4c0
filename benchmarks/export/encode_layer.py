"""Time to encode one 4096 x 4096 layer in every format, beside gptqmodel's and auto-round's packers in the same run.

    python -m benchmarks.export.encode_layer [--csv FILE] [--repeats N]

``codes`` starts from one byte a code, as training has them; ``packed`` from another format's packed words, as a
conversion has them. The other packers' bytes are compared with ours first; nothing is timed when they differ. Needs the
extras ``gptq`` and ``auto-round``.
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
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round_extension.torch.qlinear_torch import QuantLinear as AutoRoundLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT

from formats import QuantizedLinear, QuantScheme, available_formats, dequantize, get_format
from formats.base import Format, PackedFormat
from formats.errors import UnsupportedSchemeError
from formats.packed import PackedLinear

SIZE, GROUP = 4096, 64
BITS = (2, 3, 4)
FIELDS = ("bits", "who", "from", "p20_ms", "p50_ms", "p80_ms", "threads", "cpu", "versions")
VERSIONS = " ".join(f"{name} {version(name)}" for name in ("torch", "gptqmodel", "auto-round"))
Timed = tuple[str, str, Callable[[], object]]


def random_layer(bits: int) -> QuantizedLinear:
    """Uniform codes, positive fp16 scales, zeros over their whole range (1 and 2 at 2 bits, as Q2_0 holds them)."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (SIZE, SIZE), generator=generator, dtype=torch.uint8)
    low, high = (1, 3) if bits == 2 else (0, 2**bits)
    zeros = torch.randint(low, high, (SIZE, SIZE // GROUP), generator=generator, dtype=torch.int32)
    scales = (torch.rand(SIZE, SIZE // GROUP, generator=generator) + 0.5).half()
    return QuantizedLinear(codes, scales, zeros, QuantScheme(bits, GROUP))


def ours(layer: QuantizedLinear) -> Iterator[Timed]:
    """Every format that holds the layer; those that need it get a 4-bit container."""
    packed = PackedLinear.pack(layer)
    for format_id in available_formats():
        fmt = _holding(format_id, layer)
        if fmt is None:
            continue
        yield format_id, "codes", lambda fmt=fmt: fmt.encode(layer)
        if isinstance(fmt, PackedFormat):
            yield format_id, "packed", lambda fmt=fmt: fmt.encode_packed(packed)


def _holding(format_id: str, layer: QuantizedLinear) -> Format | None:
    for options in ({}, {"container_bits": "4"}):
        try:
            fmt = get_format(format_id, **options)
            fmt.check(layer.scheme, SIZE, SIZE)
        except (UnsupportedSchemeError, TypeError):  # TypeError: it has no such option
            continue
        return fmt
    return None


def theirs(layer: QuantizedLinear) -> Iterator[Timed]:
    """gptqmodel's and auto-round's packers, once their bytes are ours."""
    linear = torch.nn.Linear(SIZE, SIZE, bias=False)
    linear.weight.data = dequantize(layer)
    scales, zeros, index = layer.scales.float(), layer.zeros.float(), layer.group_index().int()
    module = TorchLinear(
        bits=layer.scheme.bits, group_size=GROUP, sym=False, desc_act=False, in_features=SIZE, out_features=SIZE,
        bias=False, pack_dtype=torch.int32, register_buffers=True, format=FORMAT.GPTQ_V2,
    )  # fmt: skip
    other = AutoRoundLinear(layer.scheme.bits, GROUP, SIZE, SIZE, False)
    other.device = "cpu"  # as its exporter sets it
    calls: list[Timed] = [
        ("gptqmodel pack_original", "weights", lambda: module.pack_original(linear, scales, zeros, index)),
        ("auto-round pack", "weights", lambda: other.pack(linear, scales, layer.zeros, device="cpu")),
    ]
    expected = get_format("gptq_v2").encode(layer)
    for (who, _, call), packed in zip(calls, (module, other), strict=True):
        call()
        for name in ("qweight", "qzeros"):
            if not torch.equal(expected[name], getattr(packed, name)):
                sys.exit(f"{layer.scheme}: {name} differs from that of {who}; nothing was timed")
    yield from calls


def milliseconds(call: Callable[[], object], repeats: int) -> list[str]:
    """20th, 50th and 80th percentile of wall times after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    deciles = statistics.quantiles(times, n=10)
    return [f"{deciles[i]:.1f}" for i in (1, 4, 7)]


def main() -> None:
    """Checks, times, prints, and appends rows to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="append the rows here")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    print(*FIELDS, sep="\t")
    for bits in BITS:
        layer = random_layer(bits)
        for who, start, call in (*ours(layer), *theirs(layer)):
            taken = milliseconds(call, arguments.repeats)
            rows.append((bits, who, start, *taken, torch.get_num_threads(), platform.machine(), VERSIONS))
            print(*rows[-1], sep="\t", flush=True)
    if arguments.csv:
        fresh = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            csv.writer(file).writerows([FIELDS, *rows] if fresh else rows)


if __name__ == "__main__":
    main()
