"""A linear layer on packed weights: ours beside cuBLAS in fp16, humming-kernels and bitblas, in one run.

    python -m benchmarks.ops.dequant_matmul [--with humming,bitblas] [--csv FILE]

Calls follow each other in a CUDA graph on layers that are together beyond the L2 cache, so weights come from memory.
Ours are launched as ``eqat generate`` does: a kernel may read weights while the one before it ends.
``bytes``: the layer's, x and y, each once; cuBLAS' fp16 weight counts as what it is. A result that is not within the
op's tolerance of float64 is not timed. humming compiles each kernel for seconds and bitblas for tens of seconds, and
bitblas is built as ``eqat_export/runtimes/bitblas_build.py`` says, without tuning.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Row, buffers, graph_times, require, write
from benchmarks.ops.layers import bitblas_calls, exact_weight, humming_calls, packed_copies, random_layer
from eqat_train.ops.dequant_matmul import dequant_matmul
from eqat_train.ops.launches import overlapping_launches
from formats import QuantizedLinear

# bits, group size, in, out, rows of x
CASES = (
    (2, 64, 4096, 4096, (1, 16, 4096)),
    (3, 128, 4096, 4096, (1, 16, 4096)),
    (4, 128, 4096, 4096, (1, 16, 4096)),
    (2, 64, 4096, 11008, (1, 16)),
    (3, 128, 4096, 11008, (1, 16)),
    (4, 128, 4096, 11008, (1, 16)),
    (2, 64, 8192, 28672, (1, 16, 4096)),
)
PEERS = ("humming", "bitblas")
DTYPE = torch.float16


def main() -> None:
    """Compiles, checks, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with", dest="peers", default="", help="humming,bitblas: those to run too")
    parser.add_argument("--csv", type=Path, default=RESULTS / "dequant_matmul.csv")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    peers = [peer for peer in options.peers.split(",") if peer]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--with takes {', '.join(PEERS)}, not {', '.join(sorted(unknown))}")
    if options.compile is not None:
        run_peers_once(peers, CASES[options.compile])
        return
    if peers:
        compile_in_parallel(peers)
    for bits, group_size, in_features, out_features, rows in CASES:
        layer = random_layer(bits, group_size, out_features, in_features)
        write(measure(layer, rows, peers), options.csv)
        torch.cuda.empty_cache()


def measure(layer: QuantizedLinear, rows: Sequence[int], peers: Sequence[str]) -> list[Row]:
    """A row for each implementation and count of rows."""
    bits, k, n = layer.scheme.bits, layer.in_features, layer.out_features
    exact = exact_weight(layer)
    layers = packed_copies(layer, buffers(k * n * bits // 8))
    weights = [exact.half() for _ in range(buffers(k * n * 2))]
    stored = sum(tensor.nbytes for tensor in (layers[0][0].qweight, layers[0][0].qzeros, layers[0][1]))
    ours = [lambda x, p=p, s=s: dequant_matmul(x, p, s) for p, s in layers]
    dense = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]
    humming = humming_calls(layer, len(layers)) if "humming" in peers else []
    found = []
    for m in rows:
        calls = {"eqat": ours, "cublas fp16": dense, "humming": humming}
        if "bitblas" in peers and bits != 3 and m <= 16:
            calls["bitblas"] = bitblas_calls(layer, len(layers), m)
        x = torch.randn(m, k, generator=torch.Generator("cuda").manual_seed(m), dtype=DTYPE, device="cuda")
        expected = x.double() @ exact.t()
        for impl, functions in calls.items():
            if functions:
                size = k * n * 2 if impl == "cublas fp16" else stored
                found.append(timed(impl, layer, functions, x, expected, size))
    return found


def timed(
    impl: str,
    layer: QuantizedLinear,
    functions: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
    expected: Tensor,
    size: int,
) -> Row:
    """One row, if the result is right."""
    require("dequant_matmul", "output", DTYPE, functions[0](x), expected)
    m, k, n = x.shape[0], layer.in_features, layer.out_features
    few = functions if m <= 16 else functions[:3]
    with overlapping_launches() if impl == "eqat" else nullcontext():
        time = graph_times([lambda f=f: f(x) for f in few], 30)
    return Row(
        "dequant_matmul",
        impl,
        f"M={m} K={k} N={n}",
        layer.scheme.bits if impl != "cublas fp16" else 0,
        layer.scheme.group_size if impl != "cublas fp16" else 0,
        "float16",
        time,
        bytes=size + (m * k + m * n) * 2,
        flops=2 * m * k * n,
    )


def compile_in_parallel(peers: Sequence[str]) -> None:
    """One process a case; the kernels end up in the libraries' caches on disk."""
    command = [sys.executable, "-m", "benchmarks.ops.dequant_matmul", "--with", ",".join(peers), "--compile"]
    running = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(len(CASES))
    ]
    for process in running:
        output = process.communicate()[0]
        if process.returncode:
            sys.exit(f"{' '.join(map(str, process.args))}\n{output[-4000:]}")


def run_peers_once(peers: Sequence[str], case: tuple[int, int, int, int, tuple[int, ...]]) -> None:
    """Every kernel of a case once."""
    bits, group_size, in_features, out_features, rows = case
    layer = random_layer(bits, group_size, out_features, in_features)
    humming = humming_calls(layer, 1) if "humming" in peers else []
    for m in rows:
        x = torch.zeros(m, in_features, dtype=DTYPE, device="cuda")
        for call in humming:
            call(x)
        if "bitblas" in peers and bits != 3 and m <= 16:
            bitblas_calls(layer, 1, m)[0](x)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
