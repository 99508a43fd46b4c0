"""The scale gradient's kernel beside what it replaces, in one run.

``eqat``: the tiled matmul that reduces its tiles. ``cublas dW``: the weight's gradient alone, materialised, which is
what the matmul costs. ``cublas dW + reduce``: the same with one kernel that reduces it; ``sliced``: 2048 output
features of it at a time. The matmul's inputs are far larger than the L2 cache.

    python -m benchmarks.ops.scale_grad --csv benchmarks/results/scale_grad.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.harness import Row, ceilings, event_times, require, write
from eqat_train.ops.packed import PackedWeight
from eqat_train.ops.scale_grad import scale_grad
from eqat_train.ops.scale_grad.reference import scale_grad as reference
from eqat_train.ops.scale_grad.tile_kernel import reduce_groups

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # in, out
BLOCK_N, BLOCK_K, SLICE = 32, 256, 2048


# ruff: noqa: N803 -- compile-time arguments are in capitals
@triton.jit
def _reduce_slice(
    dw,  # [rows, in]: the weight's gradient from output feature ``first`` on; a multiple of BLOCK_N rows, or the last
    qweight,
    qzeros,
    grad,
    first,
    rows,
    in_features,
    out_features,
    zero_words,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (n < rows)[:, None] & (k < in_features)[None, :]
    values = tl.load(dw + n[:, None].to(tl.int64) * in_features + k[None, :], mask=inside, other=0).to(tl.float32)
    start = first + tl.program_id(1) * BLOCK_N
    reduce_groups(values, qweight, qzeros, grad, start, tl.program_id(0), in_features, out_features, zero_words,
                  BITS, GROUP, 1, BLOCK_N, BLOCK_K)  # fmt: skip


def materialised(x: Tensor, grad_output: Tensor, packed: PackedWeight, rows: int) -> Tensor:
    """The scale gradient by way of ``rows`` output features of the weight's gradient at a time."""
    out_features, in_features = packed.out_features, packed.in_features
    grad = torch.empty(packed.groups, out_features, device=x.device)
    space = torch.empty(rows, in_features, dtype=x.dtype, device=x.device)
    for first in range(0, out_features, rows):
        piece = grad_output[:, first : first + rows]
        dw = torch.mm(piece.t(), x, out=space[: piece.shape[1]])
        grid = (triton.cdiv(in_features, BLOCK_K), triton.cdiv(dw.shape[0], BLOCK_N))
        _reduce_slice[grid](
            dw, packed.qweight, packed.qzeros, grad, first, dw.shape[0], in_features, out_features,
            packed.qzeros.shape[1], packed.bits, packed.group_size, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return grad


def random_packed(in_features: int, out_features: int, bits: int, group_size: int) -> PackedWeight:
    per_word = 32 // bits
    groups = -(-in_features // group_size)
    shapes = ((-(-in_features // per_word), out_features), (groups, -(-out_features // per_word)))
    qweight, qzeros = (torch.randint(0, 2 ** (bits * per_word), shape, device="cuda") for shape in shapes)
    return PackedWeight(_words(qweight), _words(qzeros), bits, group_size, in_features)


def _words(values: Tensor) -> Tensor:
    return torch.where(values >= 2**31, values - 2**32, values).int()


def measure(in_features: int, out_features: int, tokens: int, bits: int, group_size: int, dtype: torch.dtype) -> None:
    packed = random_packed(in_features, out_features, bits, group_size)
    x = torch.randn(tokens, in_features, device="cuda").to(dtype)
    grad_output = torch.randn(tokens, out_features, device="cuda").to(dtype)
    expected = reference(x.double(), grad_output.double(), packed)
    require("scale_grad", "grad", dtype, scale_grad(x, grad_output, packed, impl="triton"), expected)
    del expected
    weight_grad = torch.empty(out_features, in_features, dtype=dtype, device="cuda")
    calls: dict[str, Callable[[], object]] = {
        "eqat": lambda: scale_grad(x, grad_output, packed, impl="triton"),
        "cublas dW": lambda: torch.mm(grad_output.t(), x, out=weight_grad),
        "cublas dW + reduce": lambda: materialised(x, grad_output, packed, out_features),
        f"cublas dW + reduce, {SLICE} rows": lambda: materialised(x, grad_output, packed, SLICE),
    }
    rows = []
    for impl, call in calls.items():
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        extra = torch.cuda.max_memory_allocated() - before
        time = event_times(call, repeats=20)
        flops = 2 * tokens * in_features * out_features
        rows.append(
            Row(
                "scale_grad",
                impl,
                f"M={tokens} K={in_features} N={out_features}",
                bits,
                group_size,
                str(dtype).removeprefix("torch."),
                time,
                flops=flops,
                peak_mib=extra / 2**20,
                note=f"{flops / time.p50 / 1e6:.0f} TFLOP/s; memory is the call's own",
            )
        )
    write(rows, OPTIONS.csv)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--csv", type=Path)
    OPTIONS = parser.parse_args()
    print(f"ceilings: {ceilings()[0] / 1e12:.2f} TB/s, {ceilings()[1] / 1e12:.0f} TFLOP/s")
    for in_features, out_features in SHAPES:
        measure(in_features, out_features, OPTIONS.tokens, 2, 64, torch.bfloat16)
    for bits, group_size in ((3, 128), (4, 128), (8, 32)):
        measure(4096, 4096, OPTIONS.tokens, bits, group_size, torch.bfloat16)
