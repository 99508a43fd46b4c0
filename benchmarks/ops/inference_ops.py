"""What stands between a decoding step's linears: add_rms_norm, gated_silu and decode_attention, beside plain torch.

Each op is first compared with its reference in float64. Times are of CUDA graphs with buffers beyond the L2 cache; a
step of a 7B model launches about 160 of these kernels, each of them bounded by its launch rather than by its bytes.

    python -m benchmarks.ops.inference_ops
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Row, buffers, graph_times, require, write
from eqat_train.ops.add_rms_norm import add_rms_norm
from eqat_train.ops.decode_attention import AttentionCache, decode_attention_
from eqat_train.ops.gated_silu import gated_silu

DTYPE = torch.float16
MOST_BUFFERS = 64  # small tensors would need thousands to leave the cache, and in a model they are in it
HIDDEN, INTERMEDIATE, HEAD_DIM = 4096, 11008, 128
# heads, kv_heads: Llama-2-7B, Llama-3-8B
HEADS = ((32, 32), (32, 8))
POSITIONS = (63, 319, 2047, 4095)


def random(*shape: int) -> Tensor:
    """float16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def rows(op: str, shape: str, nbytes: int, make: Callable[[str], list[Callable[[], object]]]) -> list[Row]:
    """The kernel and the reference, timed."""
    return [
        Row(op, name, shape, 0, 0, "float16", graph_times(make(impl)), bytes=nbytes)
        for impl, name in (("triton", "eqat"), ("reference", "torch"))
    ]


def norm_rows() -> list[Row]:
    """add_rms_norm on one row."""
    x, delta, weight = random(1, HIDDEN), random(1, HIDDEN), random(HIDDEN)
    total, normed = add_rms_norm(x, delta, weight, 1e-5, impl="triton")
    _, expected = add_rms_norm(total.double(), None, weight.double(), 1e-5, impl="reference")
    require("add_rms_norm", "output", DTYPE, normed, expected)
    sets = [(random(1, HIDDEN), random(1, HIDDEN)) for _ in range(MOST_BUFFERS)]
    return rows(
        "add_rms_norm",
        f"1 x {HIDDEN}",
        2 * 5 * HIDDEN,
        lambda impl: [lambda a=a, b=b: add_rms_norm(a, b, weight, 1e-5, impl=impl) for a, b in sets],  # type: ignore[misc]
    )


def gated_silu_rows() -> list[Row]:
    """gated_silu on the halves of one row."""
    sets = [random(1, 2 * INTERMEDIATE).chunk(2, dim=-1) for _ in range(MOST_BUFFERS)]
    expected = gated_silu(*(half.double() for half in sets[0]), impl="reference")
    require("gated_silu", "output", DTYPE, gated_silu(*sets[0], impl="triton"), expected)
    return rows(
        "gated_silu",
        f"1 x {INTERMEDIATE}",
        2 * 3 * INTERMEDIATE,
        lambda impl: [lambda a=a: gated_silu(*a, impl=impl) for a in sets],  # type: ignore[misc]
    )


def attention_rows(heads: int, kv_heads: int, position: int, length: int = 4096) -> list[Row]:
    """decode_attention at one position of a cache of 4096 tokens."""
    angle = torch.rand(length, HEAD_DIM // 2, device="cuda").repeat(1, 2)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    cached = 2 * kv_heads * (position + 1) * HEAD_DIM * 2
    count = min(MOST_BUFFERS, buffers(cached))
    sets = [
        (
            random(1, (heads + 2 * kv_heads) * HEAD_DIM),
            AttentionCache(random(kv_heads, length, HEAD_DIM), random(kv_heads, length, HEAD_DIM), cos, sin),
        )
        for _ in range(count)
    ]
    where, scale = torch.tensor([position], device="cuda"), HEAD_DIM**-0.5
    qkv, cache = sets[0]
    wide = AttentionCache(cache.keys.double(), cache.values.double(), cos.double(), sin.double())
    require(
        "decode_attention",
        "output",
        DTYPE,
        decode_attention_(qkv, cache, where, scale, impl="triton"),
        decode_attention_(qkv.double(), wide, where, scale, impl="reference"),
    )
    return rows(
        "decode_attention",
        f"heads {heads}/{kv_heads} position {position}",
        cached + 2 * (2 * heads + 2 * kv_heads) * HEAD_DIM,
        lambda impl: [lambda q=q, c=c: decode_attention_(q, c, where, scale, impl=impl) for q, c in sets],  # type: ignore[misc]
    )


def main() -> None:
    """Runs the benchmark."""
    torch.manual_seed(0)
    measured = [*norm_rows(), *gated_silu_rows()]
    for heads, kv_heads in HEADS:
        for position in POSITIONS:
            measured += attention_rows(heads, kv_heads, position)
    write(measured, RESULTS / "inference_ops.csv")


if __name__ == "__main__":
    main()
