"""Conversion of a synthetic checkpoint to every format: throughput beside ``cp`` of the same bytes, and peak memory.

    python -m benchmarks.export.convert [--size 1GB] [--bits 2] [--cache warm cold] [--formats gptq,mlx] [--work FOLDER]
        [--shape 70b] [--workers auto 1 2] [--repeats N] [--once] [--copy source] [--csv FILE]

A native checkpoint of Llama-2-7B- or 70B-shaped blocks with random codes is made once; conversions run in processes of
their own, as ``eqat export`` does; the time is that of ``convert``, which ends with fsync. It is followed by ``cp -r``
and fsync of its own output, and that pair is repeated: the ratio, the conversion's throughput over the copy's in output
bytes a second, is the median over pairs, and the times are medians. ``cp`` alone, which leaves the bytes in memory, has
a column of its own.

``warm``: what is read lies in the system's cache, as after a training or a download on a machine with much memory.
``cold``: it does not, as for a checkpoint of many gigabytes: the source is dropped from the cache before a conversion,
and the output before it is copied.

Conversion and copy are each done four times in a row, into the same place, and the fastest counts: a virtual machine
may have given free memory back to its host, and whoever writes first pays for getting it again, several times the price
of copying. ``--once`` times the first, for checkpoints larger than what memory would keep anyway. ``--copy source``
copies the source instead of the output, which is removed before: room for two checkpoints suffices instead of three.

Peak memory is that of the converting process and its workers together, looked at four times a second: PSS, in which a
page that several of them share counts once, and RSS, in which it counts for each.

The first and last layer of every output are read back and compared with the source before a row is printed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.export.process_memory import TreeMemory
from formats import QuantScheme, available_formats, dequantize, get_format
from formats.affine import minmax_parameters
from formats.checkpoint import CheckpointWriter
from formats.errors import EqatError
from formats.model import open_checkpoint
from formats.model_writer import write_model_config
from formats.sizes import parse_size

GROUP = 64
MODELS = {"7b": (4096, 11008, 32, 32), "70b": (8192, 28672, 64, 8)}  # hidden and MLP sizes, heads, key-value heads
FIELDS = (
    "format", "bits", "shape", "cache", "workers", "source_mb", "output_mb", "seconds", "mb_per_s", "cp_fsync_mb_per_s",
    "cp_mb_per_s", "ratio", "peak_pss_mib", "peak_rss_mib", "torch",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "eqat_train" / "demo" / "assets"
CHILD = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(2)
from eqat_export.convert import convert
from eqat_export.memory import keep_freed_memory
from formats.errors import EqatError
sys.path.insert(0, sys.argv[1])
from benchmarks.export.convert import drop_from_cache, remove
keep_freed_memory()
source, out, target, times, cache, workers = Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]
seconds = []
try:
    for _ in range(int(times)):
        remove(out)
        if cache == "cold":
            drop_from_cache(source)
        started = time.perf_counter()
        convert(source, out, target, workers=None if workers == "auto" else int(workers))
        seconds.append(time.perf_counter() - started)
except EqatError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({"seconds": min(seconds)}))
"""


def shapes_of(shape: str) -> dict[str, tuple[int, int]]:
    """Linears of a block, ``(out_features, in_features)``."""
    hidden, ffn, heads, kv_heads = MODELS[shape]
    narrow = hidden // heads * kv_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def make_checkpoint(folder: Path, bits: int, size: int, shape: str = "7b") -> None:
    """A native Llama checkpoint of about ``size`` bytes: min-max zeros and scales of normal weights, random codes."""
    native, scheme = get_format("native"), QuantScheme(bits, GROUP)
    generator = torch.Generator().manual_seed(0)
    (hidden, ffn, heads, kv_heads), shapes = MODELS[shape], shapes_of(shape)
    parts = {}
    for name, (rows, columns) in shapes.items():
        scales, zeros = minmax_parameters(torch.randn(rows, columns, generator=generator) * 0.02, scheme)
        parts[name] = scales.half(), zeros
    config = json.loads((DEMO / "config.json").read_text()) | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": False,
        "dtype": "float16",
    }
    vocabulary = config["vocab_size"]
    block = sum(
        rows * columns * bits / 8 + rows * columns / GROUP * (2 + bits / 8) for rows, columns in shapes.values()
    )
    blocks = max(1, round((size - 4 * vocabulary * hidden) / block))
    with CheckpointWriter(folder) as writer:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            writer.add(name, torch.randn(vocabulary, hidden, generator=generator).half())
        writer.add("model.norm.weight", torch.ones(hidden).half())
        for i in range(blocks):
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"model.layers.{i}.{name}.weight", torch.ones(hidden).half())
            for name, (rows, columns) in shapes.items():
                layer = random_layer(rows, columns, scheme, *parts[name], seed=i)
                writer.add_layer(f"model.layers.{i}.{name}", native.encode_packed(layer))
        write_model_config(writer, config | {"num_hidden_layers": blocks}, native, scheme)
        writer.copy_companions(DEMO)


def random_layer(rows: int, columns: int, scheme: QuantScheme, scales: torch.Tensor, zeros: torch.Tensor, seed: int):
    """Uniform codes beside given scales and zeros, packed."""
    from formats.packed import PackedLinear  # noqa: PLC0415

    generator = torch.Generator().manual_seed(seed)
    shape = columns * scheme.bits // 32, rows
    words = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32)
    return PackedLinear(words, scales, zeros, scheme, columns)


def size_of(path: Path) -> int:
    """Bytes of a file or of a folder's files."""
    return sum(each.stat().st_size for each in files_of(path))


def files_of(path: Path) -> list[Path]:
    """The file, or the folder's files."""
    return [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]


def drop_from_cache(path: Path) -> None:
    """Has the system forget what it holds in memory of a file or of a folder's files."""
    for file in files_of(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_seconds(path: Path, copy: Path, cache: str, times: int) -> tuple[float, float]:
    """Seconds that ``cp -r`` takes for it, and seconds until the copy is on disk as well; the fastest of so many."""
    copied = durable = float("inf")
    for _ in range(times):
        remove(copy)
        if cache == "cold":
            drop_from_cache(path)
        started = time.perf_counter()
        subprocess.run(["cp", "-r", path, copy], check=True)
        copied = min(copied, time.perf_counter() - started)
        for file in files_of(copy):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        durable = min(durable, time.perf_counter() - started)
    remove(copy)
    return copied, durable


def same_weights(source: Path, out: Path) -> bool:
    """First and last layer read back equal the source's; a dense output has the rounded weights."""
    with open_checkpoint(source) as truth, open_checkpoint(out) as found:
        for name in (truth.layer_names[0], truth.layer_names[-1]):
            exact = dequantize(truth.layer(name))
            if found.format is None:
                if not torch.equal(found.get(f"{name}.weight"), exact.half()):
                    return False
            elif not torch.equal(dequantize(found.layer(name)), exact):
                return False
    return True


def run(source: Path, target: str, cache: str, workers: str, chosen: argparse.Namespace) -> list[object] | None:
    """Format, cache and all that was measured; None where the format does not hold the checkpoint."""
    out = Path(chosen.place) / f"{source.name}-{target}{get_format(target).suffix}"
    here, times = str(ROOT), 1 if chosen.once else 4
    command = [sys.executable, "-c", CHILD, here, str(source), str(out), target, str(times), cache, workers]
    rates, pss, rss, megabytes = [], 0, 0, 0.0
    for i in range(chosen.repeats):
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child,
            TreeMemory(child.pid) as memory,
        ):
            answer = json.loads(child.communicate()[0])
        if "error" in answer:
            print(f"{target}: {answer['error']}", flush=True)
            return None
        if not i:
            check(source, out, target)
        megabytes, pss, rss = size_of(out) / 1e6, max(pss, memory.pss), max(rss, memory.rss)
        copy_of = source if chosen.copy == "source" else out
        if chosen.copy == "source":
            remove(out)
        copied, durable = copy_seconds(copy_of, out.with_name(f"{out.name}.copy"), cache, times)
        size = size_of(copy_of) / 1e6
        rates.append((answer["seconds"], megabytes / answer["seconds"], size / durable, size / copied))
    remove(out)
    seconds, rate, durable_rate, copy_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    ratio = statistics.median(rate / durable for _, rate, durable, _ in rates)
    return [
        target, chosen.bits[0], chosen.shape, cache, workers, f"{size_of(source) / 1e6:.0f}", f"{megabytes:.0f}",
        f"{seconds:.2f}", f"{rate:.0f}", f"{durable_rate:.0f}", f"{copy_rate:.0f}", f"{ratio:.2f}",
        f"{pss / 2**20:.0f}", f"{rss / 2**20:.0f}", f"{torch.__version__} {platform.machine()}",
    ]  # fmt: skip


def check(source: Path, out: Path, target: str) -> None:
    """Ends the program where an output does not hold its source's weights."""
    try:
        exact = same_weights(source, out)
    except EqatError as error:
        sys.exit(f"{target}: {error}; nothing was recorded")
    if not exact:
        sys.exit(f"{target}: weights differ from the source's; nothing was recorded")


def main() -> None:
    """Makes the checkpoint, converts, prints rows and appends them to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1GB", help="bytes of the native checkpoint")
    parser.add_argument("--source", type=Path, help="a native checkpoint that is there already, instead of making one")
    parser.add_argument("--shape", choices=MODELS, default="7b", help="whose blocks")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--cache", nargs="+", choices=("warm", "cold"), default=["warm"])
    parser.add_argument("--workers", nargs="+", default=["auto"], help="processes, as eqat export --workers; or auto")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of a conversion and a copy")
    parser.add_argument("--once", action="store_true", help="do not repeat; time the first conversion and copy")
    parser.add_argument("--copy", choices=("output", "source"), default="output", help="what cp copies")
    parser.add_argument("--formats", help="ids separated by commas; all without it")
    parser.add_argument("--work", type=Path, help="where the checkpoints go; a temporary folder without it")
    parser.add_argument("--csv", type=Path, help="append the rows here, each as soon as it is measured")
    arguments = parser.parse_args()
    targets = arguments.formats.split(",") if arguments.formats else list(available_formats())
    print(*FIELDS, sep="\t")
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        for bits in arguments.bits:
            source = arguments.source or Path(work) / f"w{bits}"
            if arguments.source is None:
                make_checkpoint(source, bits, parse_size(arguments.size), arguments.shape)
            chosen = argparse.Namespace(**vars(arguments) | {"bits": [bits], "place": work})
            for target, cache, workers in itertools.product(targets, arguments.cache, arguments.workers):
                row = run(source, target, cache, workers, chosen)
                if row is not None:
                    print(*row, sep="\t", flush=True)
                    record(row, arguments.csv)
            if arguments.source is None:
                shutil.rmtree(source)


def record(row: list[object], file: Path | None) -> None:
    """Appends a row to a CSV file, with the names of its columns where it is new."""
    if file is None:
        return
    fresh = not file.exists()
    with file.open("a", newline="") as opened:
        csv.writer(opened).writerows([FIELDS, row] if fresh else [row])


if __name__ == "__main__":
    main()
