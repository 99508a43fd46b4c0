"""What training takes of a GPU at the block shapes of Llama-2 7B, 13B and 70B: peak memory and time, random weights.

Block-AP goes through everything that a block goes through in a run: the full-precision pass, validation, steps, packing
and the quantized pass, with hidden states in pinned RAM, so the peak is the block's own. E2E-QP runs whole optimizer
steps of one window on two layers and on four; what two layers add is taken for every further layer of the model, which
gives the figure that is labelled "extrapolated".

    python -m benchmarks.scaling.block_memory --csv benchmarks/results/block_memory.csv
    python -m benchmarks.scaling.block_memory --only block --shapes 70B --execution compile
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig

from benchmarks.harness import Row, Timing, write
from benchmarks.loops.block_ap_step import random_block
from benchmarks.loops.e2e_qp_step import packed_model
from eqat_train.block_ap.activations import ActivationStore
from eqat_train.block_ap.batches import batches
from eqat_train.block_ap.passes import Streams, advance_, validate
from eqat_train.block_ap.settings import BlockApSettings
from eqat_train.block_ap.steps import block_steps
from eqat_train.block_ap.trainable_block import TrainableBlock
from eqat_train.data import TokenWindows
from eqat_train.e2e_qp.fused_modules import fused_modules
from eqat_train.e2e_qp.next_token import accumulate_gradients
from eqat_train.e2e_qp.quant_linear import QuantLinear
from eqat_train.e2e_qp.recompute import plan_recomputing, recomputed_in_backward
from eqat_train.models.decoder import is_quantizable
from formats import QuantScheme

CUDA, GIB = torch.device("cuda"), 2**30
SAMPLES = 16  # windows in the store: the peak does not depend on how many
PAPER_TOKENS = 4096  # of an E2E-QP window


@dataclass(frozen=True)
class Shape:
    """A Llama-2 model: its blocks and how many there are."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int


SHAPES = {
    "7B": Shape(4096, 11008, 32, 32, 32),
    "13B": Shape(5120, 13824, 40, 40, 40),
    "70B": Shape(8192, 28672, 64, 8, 80),
}


def main() -> None:
    """Measures and writes rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--only", choices=("block", "e2e"))
    parser.add_argument("--execution", default="graph", choices=("eager", "graph", "compile"))
    parser.add_argument("--steps", type=int, default=16, help="steps that are timed")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.shapes:
        for kind, measure in (("block", block_row), ("e2e", e2e_row)):
            if options.only in (None, kind):
                _free()
                rows.append(measure(name, SHAPES[name], options))
                write(rows[-1:])
    write(rows, options.csv)


def block_row(name: str, shape: Shape, options: Namespace) -> Row:
    """One block through a whole Block-AP, w2g64, 2 x 2048 tokens a step."""
    made = Namespace(**vars(shape), batch=2, seq_len=2048, bits=2, group=64)
    block, call, x, target, _ = random_block(made)
    del target
    settings = BlockApSettings(QuantScheme(2, 64), device=CUDA, execution=options.execution)
    parameters = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        full, quantized = (
            stack.enter_context(
                ActivationStore((SAMPLES, *x.shape[1:]), torch.float32, "ram", CUDA, Path(folder) / stream)
            )
            for stream in ("full", "quantized")
        )
        for start in range(0, SAMPLES, len(x)):
            full.write(start, x)
        quantized.copy_from(full)
        del x
        streams = Streams(full, quantized)
        peaks, seconds = {}, {}
        _phase()
        started = time.perf_counter()
        advance_(full, block, call, torch.bfloat16)
        torch.cuda.synchronize()
        seconds["pass"] = (time.perf_counter() - started) / (SAMPLES * 2048)
        peaks["pass"] = _phase()
        stored = {path: torch.bfloat16 for path, _ in block.named_parameters()}
        schemes = {path: settings.scheme for path, module in block.named_modules() if is_quantizable(module)}
        trained = TrainableBlock(block, schemes, settings.scale_dtype, stored)
        validate(trained, call, streams, torch.bfloat16)
        peaks["validate"] = _phase()
        step_of = block_steps(trained, call, settings, 4096, full.read(0, 1)[0], print)
        losses, events = [], []
        while len(events) < options.steps + 6:  # warm-up, capture
            for hidden_states, wanted in batches(streams, settings.batch_size):
                losses.append(step_of(hidden_states, wanted).clone())
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()
        torch.cuda.synchronize()
        peaks["train"] = _phase()
        times = [one.elapsed_time(other) for one, other in pairwise(events[6:])]
        if not losses[-1] < losses[0]:
            raise SystemExit(f"wrong, so not reported: the loss went from {losses[0]:g} to {losses[-1]:g}")
        step_of.close()
        trained.finish_()
        advance_(quantized, block, call, torch.bfloat16)
        peaks["pack, pass"] = _phase()
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Row(
        "block_memory",
        f"Block-AP, {options.execution}",
        f"{name}: 2 x 2048, {shape.hidden}-{shape.intermediate}",
        2,
        64,
        "bfloat16",
        Timing(*(1e3 * value for value in (deciles[1], statistics.median(times), deciles[7]))),
        flops=6 * 2 * 2048 * parameters,
        peak_mib=max(peaks.values()) / 2**20,
        note="; ".join([
            f"{parameters / 1e6:.1f}M weights",
            *(f"{phase} {peak / GIB:.2f} GiB" for phase, peak in peaks.items()),
            f"pass {seconds['pass'] * 1e6:.2f} us a token",
        ]),
    )  # fmt: skip


def e2e_row(name: str, shape: Shape, options: Namespace) -> Row:
    """Optimizer steps of one window of 4096 tokens, w2g64, the least kept for backward."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=4,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=PAPER_TOKENS,
        tie_word_embeddings=False,
    )
    packed = packed_model(config, 2, 64, torch.bfloat16, "auto")
    ids = torch.randint(0, 32000, (1, PAPER_TOKENS), generator=torch.Generator().manual_seed(1))
    windows = TokenWindows.from_ids(ids)
    packed.linears.clear()  # so that a layer taken out of the model is gone
    peaks, times = {}, {}
    for layers in (4, 2):
        del packed.layers[layers:]
        _free()
        scales = [module.scales for module in packed.layers.modules() if isinstance(module, QuantLinear)]
        optimizer = torch.optim.AdamW(scales, lr=1e-5, fused=True)
        plan = plan_recomputing(list(packed.layers), PAPER_TOKENS, 2, 0)
        with fused_modules(packed.model), recomputed_in_backward(packed.layers, plan):

            def step(optimizer: torch.optim.AdamW = optimizer) -> None:
                accumulate_gradients(packed.model, windows, 1, CUDA)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            step()
            _phase()
            found = []
            for _ in range(5):
                torch.cuda.synchronize()
                started = time.perf_counter()
                step()
                torch.cuda.synchronize()
                found.append(time.perf_counter() - started)
            peaks[layers], times[layers] = _phase(), min(found)
        del optimizer, scales
    linear = [module for module in packed.layers.modules() if isinstance(module, QuantLinear)]
    weights = sum(module.in_features * module.out_features for module in linear) // 2
    growth, more = (peaks[4] - peaks[2]) / 2, (times[4] - times[2]) / 2
    whole = peaks[4] + (shape.layers - 4) * growth
    return Row(
        "block_memory",
        "E2E-QP, 4 layers",
        f"{name}: 1 x {PAPER_TOKENS}, {shape.hidden}-{shape.intermediate}",
        2,
        64,
        "bfloat16",
        Timing(*[times[4] * 1e6] * 3),
        flops=6 * PAPER_TOKENS * weights * 4,
        peak_mib=peaks[4] / 2**20,
        note=f"{weights / 1e6:.1f}M weights a layer; a layer adds {growth / GIB:.3f} GiB and {more * 1e3:.2f} ms; "
        f"extrapolated to {shape.layers} layers: {whole / GIB:.2f} GiB, "
        f"{(times[4] + (shape.layers - 4) * more) * 1e3:.0f} ms a window",
    )


def _phase() -> int:
    """Peak since the last call, in bytes."""
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
