"""What stands between the linears of an E2E-QP step: cross_entropy, add_rms_norm, rotary, gated_silu and its gradient.

Each op is first compared with its reference in float64 on part of the rows, then timed on Llama-2-7B's sizes beside its
plain-torch reference. All of them should move bytes at the rate of a copy.

    python -m benchmarks.ops.training_ops
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Row, buffers, event_times, graph_times, require, write
from eqat_train.ops.add_rms_norm import add_rms_norm
from eqat_train.ops.cross_entropy import cross_entropy_
from eqat_train.ops.gated_silu import gated_silu
from eqat_train.ops.gated_silu_grad import gated_silu_grad_
from eqat_train.ops.rotary import rotary

DTYPE = torch.bfloat16
ITEMSIZE = 2
WINDOWS, SEQUENCE = 4, 4096
TOKENS = WINDOWS * SEQUENCE
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, VOCABULARY = 4096, 11008, 32, 128, 32000
PIECE = 2048  # tokens whose logits exist together
CHECKED = 64  # rows compared with float64


def random(*shape: int) -> Tensor:
    """bfloat16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def rows(op: str, shape: str, nbytes: int, make: Callable[[str], Callable[[Tensor], object]], *size: int) -> list[Row]:
    """The kernel and the reference on tensors of a size, which together leave the cache."""
    inputs = [random(*size) for _ in range(buffers(nbytes))]
    return [
        Row(op, name, shape, 0, 0, "bfloat16", graph_times([partial(make(impl), x) for x in inputs], 10), bytes=nbytes)
        for impl, name in (("triton", "eqat"), ("reference", "torch"))
    ]


def cross_entropy_rows() -> list[Row]:
    """Losses and gradient of one piece of the tokens; the logits are overwritten, which costs no more the next time."""
    targets = torch.randint(0, VOCABULARY, (PIECE,), device="cuda")
    logits = random(PIECE, VOCABULARY)
    wide, near = logits[:CHECKED].double(), logits[:CHECKED].clone()
    expected = cross_entropy_(wide, targets[:CHECKED], impl="reference")
    require("cross_entropy", "losses", DTYPE, cross_entropy_(near, targets[:CHECKED], impl="triton"), expected)
    require("cross_entropy", "grad", DTYPE, near, wide)
    nbytes = 2 * ITEMSIZE * logits.numel()
    return [
        Row(
            "cross_entropy",
            name,
            f"{PIECE} x {VOCABULARY}",
            0,
            0,
            "bfloat16",
            event_times(partial(cross_entropy_, logits, targets, impl=impl)),
            bytes=nbytes,
        )
        for impl, name in (("triton", "eqat"), ("reference", "torch"))
    ]


def norm_rows() -> list[Row]:
    """add_rms_norm without an addition, as the training loop calls it."""
    x, weight = random(CHECKED, HIDDEN), random(HIDDEN)
    found = add_rms_norm(x, None, weight, 1e-5, impl="triton")[1]
    require("add_rms_norm", "output", DTYPE, found, add_rms_norm(x.double(), None, weight.double(), 1e-5)[1])
    return rows(
        "add_rms_norm",
        f"{TOKENS} x {HIDDEN}",
        2 * ITEMSIZE * TOKENS * HIDDEN,
        lambda impl: lambda x: add_rms_norm(x, None, weight, 1e-5, impl=impl),
        TOKENS,
        HIDDEN,
    )


def rotary_rows() -> list[Row]:
    """Rotated queries."""
    angle = torch.rand(1, SEQUENCE, HEAD_DIM // 2, device="cuda").repeat(1, 1, 2)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    x = random(1, SEQUENCE, 1, HEAD_DIM)
    expected = rotary(x.double(), cos.double(), sin.double(), impl="reference")
    require("rotary", "output", DTYPE, rotary(x, cos, sin, impl="triton"), expected)
    return rows(
        "rotary",
        f"{WINDOWS} x {SEQUENCE} x {HEADS} x {HEAD_DIM}",
        2 * ITEMSIZE * TOKENS * HEADS * HEAD_DIM,
        lambda impl: lambda x: rotary(x, cos, sin, impl=impl),
        WINDOWS,
        SEQUENCE,
        HEADS,
        HEAD_DIM,
    )


def gated_silu_rows() -> list[Row]:
    """Forward, and the gradients of both factors."""
    gate, up, grad = (random(CHECKED, INTERMEDIATE) for _ in range(3))
    wide_gate, wide_up = gate.double(), up.double()
    found = gated_silu(gate, up, impl="triton")
    require("gated_silu", "output", DTYPE, found, gated_silu(wide_gate, wide_up, impl="reference"))
    expected = gated_silu_grad_(wide_gate, wide_up, grad.double(), impl="reference")
    for actual, one in zip(gated_silu_grad_(gate, up, grad, impl="triton"), expected, strict=True):
        require("gated_silu", "grad", DTYPE, actual, one)
    size = (TOKENS, INTERMEDIATE)
    gate, up = random(*size), random(*size)
    shape, nbytes = f"{TOKENS} x {INTERMEDIATE}", ITEMSIZE * TOKENS * INTERMEDIATE
    forward = rows("gated_silu", shape, 3 * nbytes, lambda impl: lambda x: gated_silu(x, up, impl=impl), *size)
    backward = rows(
        "gated_silu_grad", shape, 5 * nbytes, lambda impl: lambda x: gated_silu_grad_(gate, up, x, impl=impl), *size
    )
    return [*forward, *backward]


def main() -> None:
    """Runs the benchmark."""
    torch.manual_seed(0)
    write([*cross_entropy_rows(), *norm_rows(), *rotary_rows(), *gated_silu_rows()], RESULTS / "training_ops.csv")


if __name__ == "__main__":
    main()
