"""Steps of E2E-QAT on one GPU and on several, with the losses of one GPU as the check.

    torchrun --nproc-per-node 1 -m benchmarks.loops.e2e_qat_step --losses losses.json
    torchrun --nproc-per-node 2 -m benchmarks.loops.e2e_qat_step --losses losses.json --share off
    torchrun --nproc-per-node 2 -m benchmarks.loops.e2e_qat_step --losses losses.json --share on

Layers have Llama-2-7B's shapes; weights and tokens are random, and the model is written to a folder that is removed
afterwards. The batch is the same whatever the number of GPUs. A step is timed from one loss to the next, so it is the
whole loop: both models, backward, reductions, AdamW, and rounding what is stored.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import RESULTS, Row, Timing, write
from eqat_train.costs.estimate import qat_bytes
from eqat_train.data import TokenWindows
from eqat_train.e2e_qat import QatSettings
from eqat_train.e2e_qat.row_linear import RowLinear
from eqat_train.e2e_qat.run import find_qat_targets, qat_identity, train_latent
from eqat_train.end_to_end.state import E2eState
from eqat_train.ranks.group import join, largest, leave, rank, size, together
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme
from formats.checkpoint import CheckpointReader

# bf16 rounds 1 in 256, and differences of one step grow through the next: as in scaling.py.
LOSS_TOLERANCE = 2e-3
WARMUP = 4
GIB = 2**30


class Clock(Reporter):
    """Losses, and the seconds at which they came."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.times: list[float] = []

    def event(self, kind: str, **fields: Any) -> None:
        """Notes a step."""
        if kind == "qat_step":
            self.losses.append(fields["loss"])
            self.times.append(time.perf_counter())

    def message(self, text: str) -> None:
        """Says it."""
        print(f"  {text}", flush=True)


def main() -> None:
    options = _options()
    join(options.device)
    with together(), tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        # every rank writes the same model for itself: no folder need be shared
        _write_model(options, own / "model")
        rows = _run(options, own)
        if not rank() and options.device == "cuda":
            write(rows, None if options.dry else RESULTS / "scaling.csv")
        largest(0)  # rank 0 has written
    leave()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=Path, help="where the run of one GPU keeps its losses")
    parser.add_argument("--share", choices=("auto", "on", "off"), default="auto", help="the full-precision model too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial, which leaves no row")
    for name, value in (
        ("layers", 4), ("hidden", 4096), ("intermediate", 11008), ("heads", 32), ("vocabulary", 32000), ("batch", 8),
        ("micro-batch", 0), ("seq-len", 2048), ("steps", 12), ("bits", 2), ("group", 64),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dry", action="store_true", help="write no rows")
    return parser.parse_args()


def _write_model(options: argparse.Namespace, folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.heads,
        max_position_embeddings=options.seq_len, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
    )


def _run(options: argparse.Namespace, folder: Path) -> list[Row]:
    windows = options.batch * options.steps
    ids = torch.randint(0, options.vocabulary, (windows, options.seq_len), generator=torch.Generator().manual_seed(1))
    settings = QatSettings(
        QuantScheme(options.bits, options.group), batch_size=options.batch, start="minmax",
        micro_batch_size=options.micro_batch or None, share_weights=options.share,
        device=torch.device(options.device, torch.cuda.current_device()) if options.device == "cuda" else "cpu",
    )  # fmt: skip
    clock, data = Clock(), TokenWindows.from_ids(ids)
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with CheckpointReader(folder / "model") as reader:
        targets = find_qat_targets(reader, settings, False)
        state = E2eState(folder / "state", qat_identity(folder / "model", data, None, settings))
        trained = train_latent(reader, targets, data, None, settings, state, clock if not rank() else Reporter(), False)
    if rank() or not _as_alone(options, clock.losses):
        return []
    times = [1e6 * (after - before) for before, after in pairwise(clock.times)][WARMUP:]
    p20, p50, p80 = (float(torch.tensor(times).quantile(share)) for share in (0.2, 0.5, 0.8))
    weights, outside = trained.report.weights, 2 * options.vocabulary * options.hidden
    shared = any(isinstance(module, RowLinear) for module in trained.teacher.modules())
    needed = qat_bytes(weights + outside, weights, ranks=size(), share_teacher=shared)
    held = sum(parameter.numel() for parameter in trained.latent.parameters)
    tokens = options.batch * options.seq_len
    print(f"  step {p50 / 1e3:.1f} ms, peak {trained.report.peak_memory / GIB:.2f} GiB, {size()} rank(s)", flush=True)
    teacher = "shared" if shared else "whole"
    note = (
        f"teacher {teacher}, {tokens / p50 * 1e6:.0f} tokens/s, {held / 1e6:.0f}M trained values a GPU, "
        f"{needed / GIB:.2f} GiB of peak by formula"
    )
    return [
        Row("scaling, e2e_qat", f"{size()} GPU", f"{options.layers} layers, {options.batch} x {options.seq_len}",
            options.bits, options.group, "bfloat16", Timing(p20, p50, p80),
            # forward and backward of the student and forward of the teacher, 8 operations a weight and token
            flops=8 * tokens // size() * weights, peak_mib=trained.report.peak_memory / 2**20, note=note)
    ]  # fmt: skip


def _as_alone(options: argparse.Namespace, losses: list[float]) -> bool:
    """Whether losses are those of one GPU, which are kept by its run; True where none are known."""
    print("  losses " + " ".join(f"{loss:.5f}" for loss in losses), flush=True)
    if options.losses is None:
        return True
    if size() == 1:
        options.losses.write_text(json.dumps(losses))
    if not options.losses.exists():
        return True
    known = json.loads(options.losses.read_text())
    difference = max(abs(one - other) / other for one, other in zip(losses, known, strict=True))
    good = difference <= LOSS_TOLERANCE
    print(f"  relative difference from one GPU {difference:.1e}" + ("" if good else ": wrong, so no row"), flush=True)
    return good


if __name__ == "__main__":
    main()
