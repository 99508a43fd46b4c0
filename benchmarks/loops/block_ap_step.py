"""One Block-AP step of a Llama block: the loop with kernels, the plain loop, and the floor, in one run.

The floor is the same block without a quantizer: bf16 autocast, fp32 weights, fused AdamW, data on the device, eager.
Every loop first trains a few steps from the same start, and its losses must equal those of the plain loop.

    python -m benchmarks.loops.block_ap_step                              # Llama-2-7B's block, 2 x 2048 tokens, w2g64
    python -m benchmarks.loops.block_ap_step --hidden 512 --intermediate 1408 --heads 8 --kv-heads 4 --seq-len 1024
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, Row, event_times, write
from eqat_train.block_ap.activations import ActivationStore, Place
from eqat_train.block_ap.batches import batches
from eqat_train.block_ap.capture import BlockCall
from eqat_train.block_ap.passes import Streams, autocast, reconstruction_loss
from eqat_train.block_ap.settings import BlockApSettings
from eqat_train.block_ap.steps import AutogradSteps, FusedSteps, GraphedSteps
from eqat_train.block_ap.trainable_block import TrainableBlock
from eqat_train.models.decoder import is_quantizable
from formats import QuantScheme

DEVICE = torch.device("cuda")
CHECKED_STEPS = 12
STORED_BATCHES = 8
# Largest relative difference of a loss: bf16 rounds 1 in 256, and differences of one step grow through the next.
LOSS_TOLERANCE = 2e-3


def main() -> None:
    """Checks, times and writes rows."""
    options = _options()
    rows, losses = [], {}
    for name, make in loops().items():
        if options.impl and name not in options.impl:
            continue
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step, parameters = make(*random_block(options))
        losses[name] = torch.stack([step().clone() for _ in range(CHECKED_STEPS)])
        if name != "floor" and "plain" in losses:
            difference = float(((losses[name] - losses["plain"]) / losses["plain"]).abs().max())
            print(
                f"{name}: losses {losses[name][0]:.6g} .. {losses[name][-1]:.6g}, relative difference {difference:.2e}"
            )
            if not difference <= LOSS_TOLERANCE:
                sys.exit(f"wrong, so not timed: more than {LOSS_TOLERANCE:g}")
        time = event_times(step, repeats=options.repeats)
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
        shape = f"{options.batch}x{options.seq_len} {options.hidden}-{options.intermediate}"
        rows.append(
            Row("block_ap_step", name, shape, options.bits, options.group, "bfloat16", time,
                flops=6 * options.batch * options.seq_len * parameters, peak_mib=peak / 2**20,
                note=f"reserved {reserved / 2**30:.2f} GiB")
        )  # fmt: skip
        write(rows[-1:])
        if options.profile:
            _profile(step, options.profile)
        del step
    if not options.dry:
        write(rows, RESULTS / "block_ap_step.csv")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("hidden", 4096), ("intermediate", 11008), ("heads", 32), ("kv-heads", 32), ("batch", 2), ("seq-len", 2048),
        ("bits", 2), ("group", 64), ("repeats", 30), ("profile", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--impl", nargs="*", help="only these loops")
    parser.add_argument("--dry", action="store_true", help="write no rows")
    return parser.parse_args()


def random_block(options: argparse.Namespace) -> tuple[nn.Module, BlockCall, Tensor, Tensor, BlockApSettings]:
    """A random block, its arguments, a batch and what the block makes of it; the same every time."""
    from transformers import LlamaConfig  # noqa: PLC0415
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        attn_implementation="sdpa",
    )
    with DEVICE:
        block = LlamaDecoderLayer(config, 0).float()
        for parameter in block.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        x = torch.randn(options.batch, options.seq_len, options.hidden)
        rotary = LlamaRotaryEmbedding(config)(x, torch.arange(options.seq_len)[None])
    call = BlockCall((), {"attention_mask": None, "position_embeddings": rotary, "use_cache": False})
    settings = BlockApSettings(QuantScheme(options.bits, options.group), device=DEVICE)
    with torch.no_grad(), autocast(DEVICE, torch.bfloat16):
        target = call.run(block, x)
    return block, call, x, target, settings


def loops() -> dict[str, Callable[..., tuple[Callable[[], Tensor], int]]]:
    def of(kind: str, place: Place = "gpu") -> Callable[..., tuple[Callable[[], Tensor], int]]:
        def make(
            block: nn.Module, call: BlockCall, x: Tensor, target: Tensor, settings: BlockApSettings
        ) -> tuple[Callable[[], Tensor], int]:
            size = sum(p.numel() for p in block.parameters() if p.dim() == 2)
            stored = {name: torch.bfloat16 for name, _ in block.named_parameters()}
            schemes = {name: settings.scheme for name, module in block.named_modules() if is_quantizable(module)}
            trainable = TrainableBlock(block, schemes, settings.scale_dtype, stored)
            total = 4096
            if kind == "plain":
                for linear in trainable.linears.values():
                    linear.impl = "reference"
            if kind in ("plain", "autograd"):
                autograd = AutogradSteps(trainable, call, settings, total, DEVICE)
                return lambda: autograd(x, target), size
            fused = FusedSteps(trainable, call, settings, total, DEVICE)
            if kind == "fused":
                return lambda: fused(x, target), size
            if kind == "compile":
                fused.differentiate.compile(None)
            graphed = GraphedSteps(fused, None)
            if place == "gpu":
                return lambda: graphed(x, target), size
            stored_batches = _from(place, x, target)
            return lambda: graphed(*next(stored_batches)), size

        return make

    return {
        "floor": _floor,
        "plain": of("plain"),
        "autograd, kernel": of("autograd"),
        "fused": of("fused"),
        "fused, graph": of("graph"),
        "fused, graph, compile": of("compile"),
        "fused, graph, from RAM": of("graph", "ram"),
        "fused, graph, from disk": of("graph", "disk"),
    }


def _from(place: Place, x: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batch again and again, from where real runs keep hidden states."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stores = []
        for name, tensor in (("quantized", x), ("full", target)):
            shape = (STORED_BATCHES * len(tensor), *tensor.shape[1:])
            store = ActivationStore(shape, torch.float32, place, DEVICE, Path(folder) / name)
            stores.append(stack.enter_context(store))
            for start in range(0, shape[0], len(tensor)):
                store.write(start, tensor)
        while True:
            yield from batches(Streams(full=stores[1], quantized=stores[0]), len(x))


def _floor(
    block: nn.Module, call: BlockCall, x: Tensor, target: Tensor, settings: BlockApSettings
) -> tuple[Callable[[], Tensor], int]:
    optimizer = torch.optim.AdamW(block.parameters(), lr=settings.lr_weight, weight_decay=0.0, fused=True)

    def step() -> Tensor:
        with autocast(DEVICE, torch.bfloat16):
            output = call.run(block, x)
        loss = reconstruction_loss(output, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, sum(p.numel() for p in block.parameters() if p.dim() == 2)


def _profile(step: Callable[[], object], lines: int) -> None:
    """Prints the kernels that take the most time of a step."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    events = [event for event in profiled.key_averages() if event.self_device_time_total]
    total, count = sum(event.self_device_time_total for event in events) / 3, sum(event.count for event in events) / 3
    print(f"  kernels {total / 1e3:.2f} ms in {count:.0f} launches a step")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:lines]:
        print(f"  {event.self_device_time_total / 3e3:8.3f} ms {event.count / 3:6.1f} x {event.key[:100]}")


if __name__ == "__main__":
    main()
