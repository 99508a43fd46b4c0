"""Training steps on one GPU and on several: Block-AP's, E2E-QP's, and the reductions between GPUs.

    torchrun --nproc-per-node 1 -m benchmarks.scaling.ranks --losses losses.json
    torchrun --nproc-per-node 2 -m benchmarks.scaling.ranks --losses losses.json

Strong scaling keeps the batch and gives each GPU a part of it; weak scaling keeps the part. Shapes are Llama-2-7B's,
weights random. The losses of the first steps are kept in a file by the run of one GPU, and later runs of several must
have the same ones over the same batches before they are timed; parameters must be the same on every rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.harness import RESULTS, Row, Timing, event_times, write
from benchmarks.loops.block_ap_step import loops, random_block
from benchmarks.loops.e2e_qp_step import packed_model
from eqat_train.data import TokenWindows
from eqat_train.e2e_qp.fused_modules import fused_modules
from eqat_train.e2e_qp.next_token import accumulate_gradients
from eqat_train.e2e_qp.recompute import plan_recomputing, recomputed_in_backward
from eqat_train.e2e_qp.shared_words import SharedWords
from eqat_train.end_to_end.shares import own_windows, sum_step_
from eqat_train.ranks.divergence import check_same
from eqat_train.ranks.group import current, join, largest, leave, mean, own_part, rank, size, together

CHECKED_STEPS = 12
# bf16 rounds 1 in 256, and differences of one step grow through the next: as in block_ap_step.py.
LOSS_TOLERANCE = 2e-3
GIB = 2**30


def main() -> None:
    options = _options()
    join("cuda")
    with together():
        _run(options)
    leave()


def _run(options: argparse.Namespace) -> None:
    say(f"{size()} GPU(s), torch {torch.__version__}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    for section in options.sections:
        started = time.perf_counter()
        rows = SECTIONS[section](options)
        if not rank():
            write(rows, None if options.dry else RESULTS / "scaling.csv")
        say(f"  ({section}: {time.perf_counter() - started:.0f} s)")
    largest(0)  # rank 0 has written


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--losses", type=Path, help="where the run of one GPU keeps its losses")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4, help="of E2E-QP's model")
    for name, value in (
        ("hidden", 4096), ("intermediate", 11008), ("heads", 32), ("kv-heads", 32), ("seq-len", 2048), ("bits", 2),
        ("group", 64), ("profile", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dry", action="store_true", help="write no rows")
    return parser.parse_args()


def say(text: str) -> None:
    if not rank():
        print(text, flush=True)


def reductions(options: argparse.Namespace) -> list[Row]:
    """Bytes a second that a GPU sends and receives in a mean of gradients, and in gathering packed words."""
    if size() == 1:
        return []
    rows = []
    hidden, intermediate = options.hidden, options.intermediate
    block = 4 * hidden**2 + 3 * hidden * intermediate
    sizes = {
        "norms": 2 * 4 * hidden,
        "q_proj": 2 * hidden**2,
        "up_proj": 2 * hidden * intermediate,
        "all linears of a block": 2 * block,
        "scales of 32 blocks": 32 * 4 * block // options.group,
    }
    for name, nbytes in sizes.items():
        values = torch.zeros(nbytes // 2, dtype=torch.bfloat16, device="cuda")
        time = event_times(partial(dist.all_reduce, values, dist.ReduceOp.AVG), options.repeats)
        rows.append(_moved("all_reduce", f"{name}, {nbytes / 1e6:.2f} MB", time, 2 * nbytes))
    for name, count in (("q_proj", hidden**2), ("up_proj", hidden * intermediate)):
        nbytes = count * options.bits // 8
        share = torch.zeros(nbytes // 4 // size(), dtype=torch.int32, device="cuda")
        words = share.new_empty(len(share) * size())
        time = event_times(partial(dist.all_gather_into_tensor, words, share), options.repeats)
        rows.append(_moved("all_gather", f"packed {name}, {nbytes / 1e6:.2f} MB", time, nbytes))
    checked = {"weights": torch.zeros(block, device="cuda")}
    rows.append(
        _moved("check_same", f"a block, {4 * block / 1e6:.0f} MB", event_times(lambda: check_same(checked, ""), 5), 0)
    )
    return rows


def _moved(op: str, shape: str, time: Timing, nbytes: int) -> Row:
    """A row; ``nbytes`` times (n - 1) / n is what each GPU of n must send."""
    sent = nbytes * (size() - 1) // size()
    rate = sent / (time.p50 / 1e6) / 1e9
    return Row(f"scaling, {op}", f"{size()} GPUs", shape, 0, 0, "-", time, note=f"{rate:.0f} GB/s sent by each GPU")


def block_ap(options: argparse.Namespace) -> list[Row]:
    """Steps of one block, gradients reduced beside backward, as one CUDA graph and kernel by kernel."""
    plans = [("strong", 2, "fused"), ("strong", 2, "fused, graph"), ("strong", 16, "fused, graph")]
    return _block_ap_rows(options, [*plans, ("weak", 2 * size(), "fused, graph")] if size() > 1 else plans)


def compiled(options: argparse.Namespace) -> list[Row]:
    """The same, compiled: half a minute for each number of samples a GPU."""
    plans = [("strong", 2, "fused, graph, compile"), ("weak", 2 * size(), "fused, graph, compile")]
    return _block_ap_rows(options, plans if size() > 1 else plans[:1])


def _block_ap_rows(options: argparse.Namespace, plans: list[tuple[str, int, str]]) -> list[Row]:
    rows = []
    for kind, batch, loop in plans:
        rows += _block_ap_row(options, kind, batch, loop)
        _free()
    return rows


def _block_ap_row(options: argparse.Namespace, kind: str, batch: int, loop: str) -> list[Row]:
    if batch % size():
        return []
    options.batch = batch
    block, call, x, target, settings = random_block(options)
    own = own_part(batch)
    x, target = x[own].clone(), target[own].clone()
    settings = replace(settings, batch_size=len(x))
    _free()
    torch.cuda.reset_peak_memory_stats()
    try:
        step, parameters = loops()[loop](block, call, x, target, settings)
        losses = mean(torch.stack([step().clone() for _ in range(CHECKED_STEPS)])).tolist()
    except (RuntimeError, ValueError) as error:  # a graph that NCCL does not permit
        say(f"  {kind} batch {batch}, {loop}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
        return []
    check_same(dict(block.named_parameters()), loop)
    if not _as_alone(options, f"block_ap {batch}", losses):
        return []
    time = event_times(step, options.repeats)
    peak = largest(torch.cuda.max_memory_allocated())
    shape = f"{batch}x{options.seq_len} {options.hidden}-{options.intermediate}"
    tokens = batch * options.seq_len / (time.p50 / 1e6)
    flops = 6 * len(x) * options.seq_len * parameters
    note = f"{kind}, {len(x)} a GPU, {tokens:.0f} tokens/s"
    return [
        Row("scaling, block_ap", f"{size()} GPU, {loop}", shape, options.bits, options.group, "bfloat16", time,
            flops=flops, peak_mib=peak / 2**20, note=note)
    ]  # fmt: skip


def _as_alone(options: argparse.Namespace, name: str, losses: list[float]) -> bool:
    """Whether losses are those of one GPU, which are kept by its run; True where none are known."""
    if options.losses is None:
        return True
    known: dict[str, Any] = json.loads(options.losses.read_text()) if options.losses.exists() else {}
    if size() == 1:
        options.losses.write_text(json.dumps({name: losses} | known))
    if name not in known:
        return True
    difference = max(abs(a - b) / b for a, b in zip(losses, known[name], strict=True))
    good = difference <= LOSS_TOLERANCE
    say(f"  {name}: losses {losses[0]:.6g} .. {losses[-1]:.6g}, relative difference from one GPU {difference:.1e}"
        + ("" if good else ": wrong, so not timed"))  # fmt: skip
    return good


def e2e_qp(options: argparse.Namespace) -> list[Row]:
    """Forward, backward and the reduction of one micro-batch: every rank with all packed words, and with its share."""
    rows = []
    plans = [("strong", 4, False), ("strong", 4, True), ("weak", 4 * size(), False), ("weak", 4 * size(), True)]
    for kind, windows, shared in plans if size() > 1 else plans[:1]:
        rows += _e2e_row(options, kind, windows, shared)
        _free()
    return rows


def _e2e_row(options: argparse.Namespace, kind: str, windows: int, shared: bool) -> list[Row]:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    ids = torch.randint(0, 32000, (windows, 4096), generator=torch.Generator().manual_seed(1))
    batch = TokenWindows.from_ids(ids)
    own, targets = own_windows(batch), batch.loss_tokens
    packed = packed_model(config, options.bits, options.group, torch.bfloat16, "auto")
    if shared and (ranks := current()) is not None:
        words = SharedWords(ranks)
        for linear in packed.linears.values():
            words.share_(linear)
        words.begin(packed.model, packed.model.get_input_embeddings(), list(packed.layers))
    _free()
    held = torch.cuda.memory_allocated()
    plan = plan_recomputing(list(packed.layers), own.input_ids.numel(), 2, 4 * GIB)

    def step() -> Tensor:
        for scale in packed.scales:
            scale.grad = None
        loss = accumulate_gradients(packed.model, own, len(own), torch.device("cuda"), targets=targets)
        return sum_step_(packed.scales, loss, False, sparse=False)[0] if size() > 1 else loss

    with fused_modules(packed.model), recomputed_in_backward(packed.layers, plan):
        losses = [step().item() for _ in range(3)]
        if not _as_alone(options, f"e2e_qp {windows}", losses):
            return []
        torch.cuda.reset_peak_memory_stats()
        time = event_times(step, options.repeats // 2)
    peak = largest(torch.cuda.max_memory_allocated())
    tokens = ids.numel() / (time.p50 / 1e6)
    place = "a share of the words" if shared else "all words"
    note = f"{kind}, {len(own)} a GPU, {place}, model {held / GIB:.2f} GiB, {tokens:.0f} tokens/s"
    shape = f"{options.layers} layers, {windows} x 4096"
    return [
        Row("scaling, e2e_qp", f"{size()} GPU", shape, options.bits, options.group, "bfloat16", time,
            peak_mib=peak / 2**20, note=note)
    ]  # fmt: skip


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "reductions": reductions,
    "e2e_qp": e2e_qp,
    "block_ap": block_ap,
    "compiled": compiled,
}

if __name__ == "__main__":
    main()
