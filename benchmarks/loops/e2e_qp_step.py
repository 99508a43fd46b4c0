"""E2E-QP's micro-step on layers of Llama-2-7B's shape, random weights: the gradient of some windows in a pass or more.

Compares this repository's loop with the plain one it replaced: the same packed model through the plain-torch
references, every layer recomputed whole, logits of all tokens at once. Before any timing, loss and scale gradients of
both are held against float32 on a shorter batch.

    python -m benchmarks.loops.e2e_qp_step --csv benchmarks/results/e2e_qp_step.csv
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from benchmarks.harness import Row, ceilings, event_times, write
from eqat_train.data import NO_LOSS, TokenWindows
from eqat_train.e2e_qp.fused_modules import fused_modules
from eqat_train.e2e_qp.next_token import accumulate_gradients
from eqat_train.e2e_qp.packed_model import PackedModel
from eqat_train.e2e_qp.quant_linear import QuantLinear
from eqat_train.e2e_qp.recompute import plan_recomputing, recomputed_in_backward
from eqat_train.models.decoder import find_decoder_layers
from eqat_train.models.loading import build_skeleton
from eqat_train.ops.packed import PackedWeight
from eqat_train.ops.tolerances import relative_error

CUDA = torch.device("cuda")
GIB = 2**30


def packed_model(config: LlamaConfig, bits: int, group_size: int, dtype: torch.dtype, impl: str) -> PackedModel:
    """A model with random packed linears; the same for every ``impl`` and, but for rounding, every dtype."""
    torch.manual_seed(0)
    model = build_skeleton(config, dtype)
    _, layers = find_decoder_layers(model)
    linears = {}
    for name, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, local = name.rpartition(".")
            linears[name] = _random_linear(module.in_features, module.out_features, bits, group_size, impl)
            setattr(layers.get_submodule(parent), local, linears[name])
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = torch.ones(parameter.shape) if parameter.dim() == 1 else torch.randn(parameter.shape) * 0.02
            parent, _, local = name.rpartition(".")
            setattr(model.get_submodule(parent), local, nn.Parameter(values.to(CUDA, dtype), requires_grad=False))
    return PackedModel(model.to(CUDA), linears, layers)


def _random_linear(in_features: int, out_features: int, bits: int, group_size: int, impl: str) -> QuantLinear:
    per_word = 32 // bits
    groups = -(-in_features // group_size)
    words = torch.randint(-(2**31), 2**31, (-(-in_features // per_word), out_features), device=CUDA)
    # zero-points in the middle of the range and scales of both signs: weights of mean zero, as trained ones are
    zero = sum((2 ** (bits - 1)) << (bits * j) for j in range(per_word))
    zeros = torch.full((groups, -(-out_features // per_word)), zero - (zero >> 31 << 32), device=CUDA)
    packed = PackedWeight(words.int(), zeros.int(), bits, group_size, in_features)
    scales = torch.rand(groups, out_features, device=CUDA) * 0.01 + 0.01
    scales *= torch.randint(0, 2, scales.shape, device=CUDA) * 2 - 1
    return QuantLinear(packed, scales, impl=impl)


def plain_step(packed: PackedModel, windows: TokenWindows) -> Tensor:
    ids, labels = windows.input_ids.to(CUDA), windows.labels.to(CUDA)
    logits = packed.model(input_ids=ids, use_cache=False).logits
    targets = F.pad(labels[:, 1:], (0, 1), value=NO_LOSS).flatten()
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=NO_LOSS, reduction="sum")
    loss = loss / windows.loss_tokens
    loss.backward()
    return loss.detach()


@contextmanager
def _whole_layers_recomputed(layers: nn.ModuleList) -> Iterator[None]:
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@contextmanager
def ours(
    packed: PackedModel, windows: TokenWindows, plan: list[int | None], windows_a_pass: int
) -> Iterator[Callable[[], Tensor]]:
    """The gradient of the training loop."""
    with fused_modules(packed.model), recomputed_in_backward(packed.layers, plan):
        yield partial(accumulate_gradients, packed.model, windows, windows_a_pass, CUDA)


@contextmanager
def plain(
    packed: PackedModel, windows: TokenWindows, plan: list[int | None], windows_a_pass: int
) -> Iterator[Callable[[], Tensor]]:
    """The loop that was replaced."""
    del plan, windows_a_pass
    with _whole_layers_recomputed(packed.layers):
        yield partial(plain_step, packed, windows)


LOOPS = {"reference": plain, "auto": ours}


def loss_and_gradients(step: Callable[[], Tensor], packed: PackedModel) -> tuple[float, Tensor]:
    packed.model.zero_grad(set_to_none=True)
    loss = step().item()
    grads = torch.cat([scale.grad.flatten() for scale in packed.scales if scale.grad is not None])
    packed.model.zero_grad(set_to_none=True)
    return loss, grads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument(
        "--plans",
        type=_plan,
        nargs="+",
        default=[(2, 100.0), (1, 100.0), (2, 0.0), (4, 100.0), (4, 4.9), (4, 0.0)],
        metavar="WINDOWS:GIB",
        help="windows a pass, and GiB that forward is planned to keep for backward; a row each (100: everything, "
        "0: the least)",
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=options.layers,
        num_attention_heads=32,
        max_position_embeddings=options.seq_len,
        tie_word_embeddings=False,
    )
    check(config, options.bits, options.group)
    ids = torch.randint(0, 32000, (options.windows, options.seq_len), generator=torch.Generator().manual_seed(1))
    windows = TokenWindows.from_ids(ids)
    shape = f"{options.layers} layers, {options.windows} x {options.seq_len}"
    _free()
    if (left := torch.cuda.memory_allocated()) > 2**26:
        print(f"{left / GIB:.2f} GiB were allocated before: run this in a process of its own to compare peaks")
    rows = []
    loops = [("plain torch", "reference", 4, 0.0), *(("eqat", "auto", *plan) for plan in options.plans)]
    for name, impl, windows_a_pass, memory in loops:
        packed = packed_model(config, options.bits, options.group, torch.bfloat16, impl)
        plan = plan_recomputing(list(packed.layers), windows_a_pass * options.seq_len, 2, int(memory * GIB))
        for scale in packed.scales:
            scale.grad = torch.zeros_like(scale)
        with LOOPS[impl](packed, windows, plan, windows_a_pass) as step:
            for _ in range(2):
                step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            time = event_times(step, repeats=options.repeats if impl == "auto" else 3, warmup=1)
        rows.append(
            Row(
                "e2e_qp_step",
                name,
                shape,
                options.bits,
                options.group,
                "bfloat16",
                time,
                flops=count_flops(config, options.windows, options.seq_len),
                peak_mib=torch.cuda.max_memory_allocated() / 2**20,
                note="whole layers recomputed" if impl == "reference" else _note(plan, windows_a_pass),
            )
        )
        del packed, step
        _free()
    write(rows, options.csv)


def _plan(text: str) -> tuple[int, float]:
    windows, _, memory = text.partition(":")
    return int(windows), float(memory)


def _note(plan: list[int | None], windows_a_pass: int) -> str:
    kept = "nothing recomputed" if set(plan) == {None} else f"outputs kept a layer: {plan}"
    return f"{windows_a_pass} windows a pass, {kept}"


def _free() -> None:
    """Models are full of reference cycles: what is not collected would count in the next row's peak."""
    gc.collect()
    torch.cuda.empty_cache()


def count_flops(config: LlamaConfig, windows: int, seq_len: int) -> int:
    """What a step must compute: forward, dX and dW of every linear, the head and its dX, causal attention."""
    tokens, hidden = windows * seq_len, config.hidden_size
    linears = config.num_hidden_layers * (4 * hidden**2 + 3 * hidden * config.intermediate_size)
    attention = config.num_hidden_layers * windows * seq_len**2 * hidden * 2  # both products, half of them masked
    return int(3 * 2 * tokens * linears + 2 * 2 * tokens * hidden * config.vocab_size + 3.5 * attention)


def check(config: LlamaConfig, bits: int, group_size: int) -> None:
    """Ends the benchmark unless bfloat16 is as near to float32 in our loop as in the plain one."""
    ids = torch.randint(0, config.vocab_size, (2, 1024), generator=torch.Generator().manual_seed(2))
    windows = TokenWindows.from_ids(ids)
    packed = packed_model(config, bits, group_size, torch.float32, "reference")
    with plain(packed, windows, [], 2) as step:
        expected = loss_and_gradients(step, packed)
    found = {}
    for impl in ("reference", "auto"):
        packed = packed_model(config, bits, group_size, torch.bfloat16, impl)
        plan: list[int | None] = [(0, 1, 4, None)[i % 4] for i in range(len(packed.layers))]
        with LOOPS[impl](packed, windows, plan, 2) as step:
            found[impl] = loss_and_gradients(step, packed)
            again = loss_and_gradients(step, packed)
        loss, grads = found[impl]
        print(
            f"check, {impl}: loss {loss:.6f} (float32 {expected[0]:.6f}), scale gradients differ by "
            f"{relative_error(grads, expected[1]):.2e}; a second step differs by {relative_error(again[1], grads):.1e}"
        )
    errors = {impl: relative_error(grads, expected[1]) for impl, (_, grads) in found.items()}
    losses = {impl: abs(loss - expected[0]) for impl, (loss, _) in found.items()}
    if not (errors["auto"] <= 1.1 * errors["reference"] and losses["auto"] <= 2 * losses["reference"] + 1e-3):
        sys.exit("wrong, so not timed: further from float32 than plain bfloat16 is")


if __name__ == "__main__":
    print(f"ceilings: {ceilings()[0] / 1e12:.2f} TB/s, {ceilings()[1] / 1e12:.0f} TFLOP/s")
    main()
