"""Fake quantization, forward and backward, and the fused training step of a weight, against copy bandwidth.

python -m benchmarks.ops.fake_quant
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Row, buffers, graph_times, require, write
from eqat_train.ops.fake_quant import fake_quant
from eqat_train.ops.fake_quant.reference import gradients as reference_gradients
from eqat_train.ops.fake_quant.reference import stored_scales, stored_zeros
from eqat_train.ops.fake_quant.triton import gradients as kernel_gradients
from eqat_train.ops.fake_quant.triton import quantizer
from eqat_train.ops.fake_quant_adamw import AdamW, Moments, fake_quant_adamw_, schedule_row

SHAPES = ((4096, 4096), (11008, 4096))
SCHEMES = ((2, 64), (3, 128), (4, 32), (4, -1))
DTYPE = torch.bfloat16


def main() -> None:
    """Checks, times and writes rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="write no rows")
    parser.add_argument("--quick", action="store_true", help="one shape and one scheme")
    options = parser.parse_args()
    rows: list[Row] = []
    for rows_, columns in SHAPES[1:] if options.quick else SHAPES:
        for bits, group_size in SCHEMES[:1] if options.quick else SCHEMES:
            rows += _measure(rows_, columns, bits, group_size)
    if not options.dry:
        write(rows, RESULTS / "fake_quant.csv")


def _measure(out: int, columns: int, bits: int, group_size: int) -> list[Row]:
    size, groups = out * columns, out * columns // (columns if group_size == -1 else group_size)
    cases = [_case(out, columns, bits, group_size, seed) for seed in range(buffers(6 * size))]
    _check(cases[0], bits, group_size)
    adamw = AdamW()
    schedule = torch.tensor([schedule_row(0, (2e-5, 1e-4, 1e-4), adamw)], device="cuda")
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def forward(case: list[Tensor], impl: str) -> Callable[[], object]:
        return lambda: fake_quant(*case[:3], bits, group_size, torch.float16, DTYPE, impl=impl)

    def backward(case: list[Tensor], impl: str) -> Callable[[], object]:
        if impl == "reference":
            s, z = stored_scales(case[1], torch.float16).float(), stored_zeros(case[2], bits)
            return lambda: reference_gradients(case[0], s, z, bits, case[3])
        group = quantizer(bits, columns if group_size == -1 else group_size, torch.float16)
        return lambda: kernel_gradients(*case, group, (True, True, True))

    def fused(case: list[Tensor], impl: str) -> Callable[[], object]:
        weight, scales, zeros = (tensor.clone() for tensor in case[:3])
        moments = (Moments.of(weight), Moments.of(scales), Moments.of(zeros))
        result = torch.empty_like(case[3])
        return lambda: fake_quant_adamw_(
            weight, scales, zeros, case[3], result, moments, schedule, step, adamw, bits, group_size, impl=impl
        )

    rows = []
    for name, make, nbytes in (
        ("fake_quant", forward, 6 * size + 8 * groups),
        ("fake_quant_backward", backward, 10 * size + 16 * groups),
        ("fake_quant_adamw", fused, 28 * size + 48 * groups),
    ):
        for impl in ("triton", "reference"):
            calls: list[Any] = [make(case, impl) for case in cases]
            time = graph_times(calls, replays=20)
            rows.append(Row(name, impl, f"{out}x{columns}", bits, group_size, "bfloat16", time, bytes=nbytes))
            write(rows[-1:])
    return rows


def _case(out: int, columns: int, bits: int, group_size: int, seed: int) -> list[Tensor]:
    """Weight, scales, zeros and an incoming gradient."""
    generator = torch.Generator("cuda").manual_seed(seed)
    width = columns if group_size == -1 else group_size
    weight = torch.randn(out, columns, device="cuda", generator=generator) * 0.02
    spread = weight.reshape(out, -1, width).amax(2) - weight.reshape(out, -1, width).amin(2)
    scales = spread / (2**bits - 1)
    zeros = (-weight.reshape(out, -1, width).amin(2) / scales).round()
    return [weight, scales, zeros, torch.randn(out, columns, device="cuda", generator=generator).to(DTYPE)]


def _check(case: list[Tensor], bits: int, group_size: int) -> None:
    """Forward bit for bit, gradients against float64."""
    weight, scales, zeros, gradient = case
    leaves = [tensor.clone().requires_grad_() for tensor in (weight, scales, zeros)]
    arguments = (bits, group_size, torch.float16, DTYPE)
    output = fake_quant(*leaves, *arguments, impl="triton")
    require("fake_quant", "weight", DTYPE, output, fake_quant(*case[:3], *arguments, impl="reference"))
    output.backward(gradient)
    for leaf, want in zip(leaves, _float64_gradients(case, bits), strict=True):
        assert leaf.grad is not None
        require("fake_quant", "grad", DTYPE, leaf.grad, want)


def _float64_gradients(case: list[Tensor], bits: int) -> list[Tensor]:
    """By the formulas in ops/fake_quant/reference.py; only the codes are fp32's, because ties are decided there."""
    weight, scales, zeros, gradient = case
    grouped = (*scales.shape, weight.shape[1] // scales.shape[1])
    s, z = scales.half().float().unsqueeze(2), zeros.unsqueeze(2)
    r = (weight.reshape(grouped) / s).round() + z
    q = r.clamp(0, 2**bits - 1)
    m, g = r == q, gradient.double().reshape(grouped)
    t = weight.double().reshape(grouped) / s.double()
    scale_terms = g * (q.double() - z.double() - m * t)
    zero_terms = g * (m.double() - 1) * s.double()
    return [(g * m).reshape_as(weight), scale_terms.sum(2), zero_terms.sum(2)]


if __name__ == "__main__":
    main()
