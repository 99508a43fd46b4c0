"""Unpacking a layer's weight to float16: our kernel and the plain-torch reference.

    python -m benchmarks.ops.dequant [--csv FILE]

Calls follow each other in a CUDA graph on layers that are together beyond the L2 cache. ``bytes``: words, zero-points
and scales read once, the weight written once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, Row, buffers, graph_times, require, write
from benchmarks.ops.layers import exact_weight, packed_copies, random_layer
from eqat_train.ops.dequant import dequant

SHAPES = ((4096, 4096), (11008, 4096), (28672, 8192))  # out, in
SCHEMES = ((2, 64), (3, 128), (4, 128), (8, 128))


def main() -> None:
    """Checks, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS / "dequant.csv")
    options = parser.parse_args()
    for bits, group_size in SCHEMES:
        for shape in SHAPES:
            write(measure(bits, group_size, *shape), options.csv)
            torch.cuda.empty_cache()


def measure(bits: int, group_size: int, out_features: int, in_features: int) -> list[Row]:
    """A row for each implementation."""
    layer = random_layer(bits, group_size, out_features, in_features)
    expected = exact_weight(layer).float().half()
    layers = packed_copies(layer, buffers(out_features * in_features * 2))
    packed, scales = layers[0]
    read = sum(t.nbytes for t in (packed.qweight, packed.qzeros, scales))
    rows = []
    for impl in ("triton", "reference"):
        require("dequant", "weight", torch.float16, dequant(packed, scales, torch.float16, impl=impl), expected)
        calls = [lambda p=p, s=s, impl=impl: dequant(p, s, torch.float16, impl=impl) for p, s in layers]
        rows.append(
            Row(
                "dequant",
                "eqat" if impl == "triton" else "eqat reference",
                f"K={in_features} N={out_features}",
                bits,
                group_size,
                "float16",
                graph_times(calls if impl == "triton" else calls[:1], 20),
                bytes=read + out_features * in_features * 2,
            )
        )
    return rows


if __name__ == "__main__":
    main()
