"""Peak CPU memory of ``eqat train`` on a checkpoint of any size: one block and the activations, or the run is killed.

A Llama of many wide blocks with random bf16 weights is written, shard by shard, and trained in a process that the
system stops from taking more than a limit: ``RLIMIT_DATA`` (everything that is not a file's own pages), or with
``--cgroup`` a memory cgroup, which counts page cache, libraries and all. A run of the same model with three blocks
comes first, and its peak is the baseline: what more blocks add is what grows with the model.

    python -m benchmarks.scaling.train_memory --size 8GB --limit 2GB --cgroup
    python -m benchmarks.scaling.train_memory --size 300MB --hidden 512 --intermediate 2048
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from formats.checkpoint import CheckpointWriter
from formats.sizes import parse_size

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "eqat_train" / "demo" / "assets"
CGROUPS = Path("/sys/fs/cgroup/memory")  # version 1; version 2 has no such folder
HEAD = 64
TEXT, TEXT_CHARACTERS = "train.txt", 100_000  # tokenizing more of the demo's text would take more than a small block


def make_model(
    folder: Path, blocks: int, hidden: int, intermediate: int, *, vocabulary: int = 2048, shard_size: int = 5 * 10**9
) -> Path:
    """A bf16 Llama with random weights and the demo's tokenizer; memory is one tensor's."""
    config = json.loads((DEMO / "config.json").read_text()) | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD,
        "head_dim": HEAD,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    matrices = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    matrices |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    matrices |= {"mlp.down_proj": (hidden, intermediate)}
    draw = torch.Generator().manual_seed(0)
    values = (torch.randn(2**20 + 7, generator=draw) * 0.02).to(torch.bfloat16)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        start = int(torch.randint(0, 2**10, (), generator=draw))
        count = rows * columns
        return values[start:].repeat(-(-count // (len(values) - start)))[:count].view(rows, columns)

    with CheckpointWriter(folder, shard_size=shard_size) as writer:
        writer.add("model.embed_tokens.weight", matrix(vocabulary, hidden))
        for index in range(blocks):
            for name, shape in matrices.items():
                writer.add(f"model.layers.{index}.{name}.weight", matrix(*shape))
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"model.layers.{index}.{name}.weight", torch.ones(hidden, dtype=torch.bfloat16))
        writer.add("model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16))
        writer.add("lm_head.weight", matrix(vocabulary, hidden))
        writer.write_json("config.json", config)
        writer.copy_companions(DEMO)
    with lzma.open(DEMO / "calibration.txt.xz", "rt", encoding="utf-8") as text:
        (folder / TEXT).write_text(text.read(TEXT_CHARACTERS), encoding="utf-8")
    return folder


def block_weights(hidden: int, intermediate: int) -> int:
    """Weights of a block's linears."""
    return 4 * hidden**2 + 3 * hidden * intermediate


def train_under_limit(model: Path, limit: int, settings: dict[str, Any], *, hold: bool = False) -> None:
    """Trains in a fork of this process, which has imported everything, and prints what came of it as JSON.

    Args:
        model: the model's folder.
        limit: bytes of ``RLIMIT_DATA`` beyond what the process has when everything is imported; 0 sets none.
        settings: of the run.
        hold: keep the block before, as a program that has two in memory does: the limit must stop it.
    """
    torch.set_num_threads(1)
    from eqat_train.block_ap import run as block_ap  # noqa: PLC0415
    from eqat_train.config import build_config  # noqa: PLC0415
    from eqat_train.models.loading import build_skeleton, load_tokenizer  # noqa: PLC0415
    from eqat_train.pipeline.train import train  # noqa: PLC0415
    from eqat_train.reporting.progress import Reporter  # noqa: PLC0415

    build_skeleton(model, torch.float32)  # imports what transformers imports late
    load_tokenizer(model)
    if child := os.fork():
        os.waitpid(child, 0)
        return
    before = memory()
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (before["data"] + limit, resource.RLIM_INFINITY))
    if hold:
        held: list[torch.Tensor] = []
        unload_ = block_ap.unload_

        def keep(module: torch.nn.Module) -> None:
            held[:] = [parameter.detach() for parameter in module.parameters()]
            unload_(module)

        block_ap.unload_ = keep
    usual = {"data": str(model / TEXT), "activations": "disk", "stage": "block-ap", "val_samples": 1}
    started, error = time.perf_counter(), ""
    try:
        train(
            build_config({**usual, **settings, "model": str(model), "out": f"{model}-trained", "force": True}),
            Reporter(),
        )
    except (RuntimeError, MemoryError) as exc:
        error = f"{type(exc).__name__}: {exc}"
    seconds = time.perf_counter() - started
    print(json.dumps({"error": error, "before": before, "after": memory(), "seconds": seconds}), flush=True)
    os._exit(0)


def memory() -> dict[str, int]:
    """Bytes of this process: private and writable now, resident now, and resident at the most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"data": "VmData", "anonymous": "RssAnon", "resident": "VmRSS", "peak": "VmHWM"}
    return {name: int(lines[key].split()[0]) * 1024 for name, key in names.items()}


def run_child(
    models: Sequence[Path],
    limit: int,
    settings: dict[str, Any],
    *,
    hold: bool = False,
    cgroup: Path | None = None,
) -> list[dict[str, Any]]:
    """``train_under_limit`` for each of ``models``, the last one with ``hold``, in a process of its own.

    The checkpoint appears beside the model, as ``MODEL-trained``.
    """
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom benchmarks.scaling.train_memory import train_under_limit\n"
        "limit, settings, hold, *models = sys.argv[1:]\n"
        "for number, model in enumerate(models, 1):\n"
        "    last = hold and number == len(models)\n"
        "    train_under_limit(Path(model), int(limit), json.loads(settings), hold=bool(last))"
    )
    words = [limit, json.dumps(settings), "hold" if hold else "", *models]
    # a mapping for every tensor: the limit is on what is held, not on the holes of a heap
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}

    def enter() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=enter,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(found) != len(models):
        raise RuntimeError(f"ended with {done.returncode}, {len(found)} of {len(models)} runs: {done.stderr[-400:]}")
    return found


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A memory cgroup (version 1) of so many bytes; needs root."""
    group = CGROUPS / f"eqat-train-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def main() -> None:
    """Makes the checkpoint, trains it under the limit, and prints a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8GB", help="of the checkpoint")
    parser.add_argument("--limit", default="2GB", help="of the process, everything counted, imports too")
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--intermediate", type=int, default=5120)
    parser.add_argument("--shard-size", default="4GB")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--stage", default="block-ap")
    parser.add_argument("--evaluate", action="store_true", help="measure perplexities too")
    parser.add_argument("--cgroup", action="store_true")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    weights = block_weights(options.hidden, options.intermediate)
    blocks = -(-parse_size(options.size) // (2 * weights))
    limit = parse_size(options.limit)
    settings = {"samples": options.samples, "seq_len": options.seq_len, "epochs": 1, "stage": options.stage}
    if options.evaluate:
        settings |= {"eval_data": str(DEMO / "heldout.txt.xz"), "eval_tokens": 4 * options.seq_len}
    folder = Path(tempfile.mkdtemp(dir=options.work))
    try:
        for count in (3, blocks):
            model = make_model(
                folder / "model", count, options.hidden, options.intermediate, shard_size=parse_size(options.shard_size)
            )
            files = sorted(file.stat().st_size for file in model.glob("*.safetensors"))
            with memory_cgroup(limit) if options.cgroup else contextlib.nullcontext() as group:
                (found,) = run_child([model], 0 if options.cgroup else limit, settings, cgroup=group)
                peak = int((group / "memory.max_usage_in_bytes").read_text()) if group else 0
            if found["error"]:
                sys.exit(f"{count} blocks: {found['error']}")
            before, after = found["before"]["resident"] / 2**30, found["after"]["peak"] / 2**30
            print(
                f"{count} blocks of {weights / 1e6:.1f}M weights, {sum(files) / 1e9:.2f} GB in {len(files)} shards of "
                f"up to {files[-1] / 1e9:.2f} GB: {found['seconds']:.0f} s, resident {before:.2f} GiB after imports "
                f"and {after:.2f} at the most"
                + (f"; cgroup peak {peak / 2**30:.2f} of {limit / 2**30:.2f} GiB" if group else ""),
                flush=True,
            )
            for left in ("model", "model-trained"):
                shutil.rmtree(folder / left)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
