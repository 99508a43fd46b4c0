"""Layers of exported checkpoints in humming-kernels: their weights, their outputs, their time. Needs an NVIDIA GPU.

    python -m benchmarks.export.humming_layers [--rows 1,16,256,4096] [--json FILE]

For w2g64, w3g128 and w4g128 a checkpoint with one layer of each shape is written natively and exported by
``eqat_export.convert`` to compressed-tensors and gptq_v2. humming's own loader reads each layer from the export.

- bitwise: outputs for all unit vectors equal ``(q - z) * s`` rounded to fp16, bit for bit.
- rel err: random fp16 inputs, L2 against float64 with the same fp16 weights; ``x rounding`` divides it by what storing
  exact outputs in fp16 costs.
- us: median of CUDA graph replays of 20 calls, weights hot in L2 where they fit, beside torch's fp16 matmul with the
  dequantized weight. No time is printed for a layer that is not bitwise right.

Kernels compile on first use (seconds each); every scheme and shape does so in a process of its own beforehand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import graph_times
from eqat_export.convert import convert
from eqat_export.runtimes.humming import HummingSession
from formats import QuantScheme, dequantize, get_format, round_to_nearest
from formats.checkpoint import CheckpointWriter
from formats.model import Checkpoint, open_checkpoint
from formats.model_writer import write_layer, write_model_config
from formats.types import QuantizedLinear

SCHEMES = (QuantScheme(2, 64), QuantScheme(3, 128), QuantScheme(4, 128))
SHAPES = {"self_attn.q_proj": (512, 512), "mlp.up_proj": (1408, 512), "mlp.down_proj": (512, 1408), "big": (4096, 4096)}
TARGETS = ("compressed-tensors", "gptq_v2")
CALLS, REPLAYS = 20, 30
FIELDS = ("bits", "group", "format", "out x in", "M", "rel err", "x rounding", "bitwise", "humming us", "torch fp16 us")


def main() -> None:
    """Exports, compiles, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,16,256,4096")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", nargs=2, metavar=("FOLDER", "LAYER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = [int(number) for number in options.rows.split(",")]
    if options.compile:
        compile_kernels(Path(options.compile[0]), options.compile[1], rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        exports = {(scheme, target): export(Path(folder), scheme, target) for scheme in SCHEMES for target in TARGETS}
        if not torch.cuda.is_available():
            sys.exit("exports written and read back; humming itself needs an NVIDIA GPU")
        print(versions(), flush=True)
        start = time.perf_counter()
        compile_in_parallel([exports[scheme, TARGETS[0]] for scheme in SCHEMES], options.rows)
        print(f"compiled in {time.perf_counter() - start:.0f} s\n", flush=True)
        print("| " + " | ".join(FIELDS) + " |\n|" + "---|" * len(FIELDS), flush=True)
        results = []
        for (scheme, target), path in exports.items():
            with open_checkpoint(path) as checkpoint:
                session = HummingSession(checkpoint, torch.device("cuda"))
                for name in checkpoint.layer_names:
                    for row in measure(checkpoint, session, name, rows):
                        results.append({"bits": scheme.bits, "group": scheme.group_size, "format": target, **row})
                        print("| " + " | ".join(shown(results[-1][key]) for key in FIELDS) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "rows": results}, indent=1))


def random_layer(scheme: QuantScheme, out_features: int, in_features: int) -> QuantizedLinear:
    """A random normal weight, quantized by min-max with zero-points pushed to 0 and maxq in two groups of five."""
    generator = torch.Generator().manual_seed(out_features + scheme.bits)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    groups = scheme.groups(in_features)
    shift = (torch.arange(out_features * groups).view(out_features, groups) % 5).clamp(max=2)  # 0, 1, 2, 2, 2
    offset = torch.tensor([0.08, -0.08, 0.0])[shift].repeat_interleave(scheme.group_size, dim=1)
    return round_to_nearest(weight + offset, scheme)


def export(folder: Path, scheme: QuantScheme, target: str) -> Path:
    """A native checkpoint of one layer a shape, converted."""
    source, out = folder / f"{scheme}", folder / f"{scheme}-{target}"
    if not source.exists():
        fmt = get_format("native")
        with CheckpointWriter(source) as writer:
            writer.add("model.embed_tokens.weight", torch.zeros(8, 8, dtype=torch.float16))
            for name, shape in SHAPES.items():
                write_layer(writer, fmt, f"model.layers.0.{name}", random_layer(scheme, *shape))
            write_model_config(writer, {"model_type": "llama", "dtype": "float16"}, fmt, scheme)
    convert(source, out, target)
    with open_checkpoint(source) as ours, open_checkpoint(out) as theirs:
        for name in ours.layer_names:
            if not torch.equal(dequantize(ours.layer(name)), dequantize(theirs.layer(name))):
                sys.exit(f"{out}: {name} was not held exactly")
    return out


def compile_kernels(folder: Path, layer: str, rows: list[int]) -> None:
    """Runs one layer of an export once for every count of rows."""
    with open_checkpoint(folder) as checkpoint:
        checkpoint.layer_names = (layer,)
        session, in_features = HummingSession(checkpoint, torch.device("cuda")), checkpoint.layer_features(layer)[1]
        run = session.layer(layer)
        assert run is not None
        for count in sorted({*rows, in_features}):
            run(torch.zeros(count, in_features, dtype=torch.float16, device="cuda"))
    torch.cuda.synchronize()


def compile_in_parallel(folders: list[Path], rows: str) -> None:
    """One process a scheme and shape; the kernels end up in humming's cache on disk."""
    running = []
    for folder in folders:
        for name in SHAPES:
            command = [sys.executable, "-m", "benchmarks.export.humming_layers", "--rows", rows]
            command += ["--compile", str(folder), f"model.layers.0.{name}"]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in running:
        output = process.communicate()[0]
        if process.returncode:
            sys.exit(f"{' '.join(map(str, process.args))}\n{output[-4000:]}")


def measure(checkpoint: Checkpoint, session: HummingSession, name: str, rows: list[int]) -> list[dict[str, Any]]:
    """One row of the table for every count of input rows."""
    layer = checkpoint.layer(name)
    run = session.layer(name)
    assert run is not None
    weight = dequantize(layer).half().cuda()  # [out, in]
    identity = torch.eye(layer.in_features, dtype=torch.float16, device="cuda")
    wrong = int((run(identity).T != weight).sum())
    exact_weight = weight.double()
    found = []
    for count in rows:
        generator = torch.Generator(device="cuda").manual_seed(count)
        inputs = torch.randn(count, layer.in_features, generator=generator, dtype=torch.float16, device="cuda")
        exact = inputs.double() @ exact_weight.T
        error = relative(run(inputs), exact)
        row = {
            "out x in": f"{layer.out_features} x {layer.in_features}",
            "M": count,
            "rel err": error,
            "x rounding": error / relative(exact.half(), exact),
            "bitwise": "yes" if not wrong else f"no ({wrong} differ)",
            "humming us": None if wrong else timed(lambda inputs=inputs: run(inputs)),
            "torch fp16 us": timed(lambda inputs=inputs: torch.nn.functional.linear(inputs, weight)),
        }
        found.append(row)
    return found


def relative(found: Tensor, exact: Tensor) -> float:
    """``||found - exact|| / ||exact||``, L2."""
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))


def timed(call: Callable[[], Tensor]) -> float | None:
    """Median time of a call inside a CUDA graph of many, µs; or None and the reason on stderr: figures already printed
    are worth keeping.
    """
    try:
        with torch.inference_mode():
            return graph_times([call] * CALLS, REPLAYS).p50
    except RuntimeError as error:
        print(f"not timed: {error}", file=sys.stderr, flush=True)
        return None


def versions() -> str:
    """What the figures belong to."""
    import humming  # noqa: PLC0415

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, humming-kernels {humming.__version__}"


def shown(value: Any) -> str:
    """A cell of the table."""
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 10
        else f"{value:.1f}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    main()
