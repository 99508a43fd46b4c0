"""One AdamW step of a fake-quantized weight: torch's AdamW in float64, and the weight that the next step uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eqat_train.ops.fake_quant import fake_quant
from eqat_train.ops.fake_quant_adamw import AdamW, Moments, fake_quant_adamw_, schedule_row
from eqat_train.ops.tolerances import relative_error
from formats.errors import InputError
from tests.interpreter import rounding_to_bfloat16

RATES = (1e-2, 1e-3, 1e-1)
STEPS = 4


@pytest.fixture(autouse=True)
def rounding(kernel_device: torch.device) -> Iterator[None]:
    with rounding_to_bfloat16():
        yield


def _parameters(bits: int, group_size: int, rows: int, columns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(bits)
    groups = columns // (columns if group_size == -1 else group_size)
    return [
        torch.randn(rows, columns, generator=generator),
        torch.rand(rows, groups, generator=generator) * 4 / 2**bits + 0.01,
        torch.rand(rows, groups, generator=generator) * (2**bits - 1),
    ]


def _gradients(shape: torch.Size, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(STEPS)]


def _moments(parameters: list[Tensor], frozen: tuple[int, ...]) -> tuple[Moments | None, ...]:
    return tuple(None if index in frozen else Moments.of(tensor) for index, tensor in enumerate(parameters))


def _by_torch(
    parameters: list[Tensor], gradients: list[Tensor], adamw: AdamW, bits: int, group_size: int, frozen: tuple[int, ...]
) -> list[Tensor]:
    """Gradients of the reference, updated by torch's own AdamW in float64."""
    doubles = [torch.nn.Parameter(tensor.double()) for tensor in parameters]
    trained = [
        {"params": [p], "lr": lr} for i, (p, lr) in enumerate(zip(doubles, RATES, strict=True)) if i not in frozen
    ]
    optimizer = torch.optim.AdamW(trained, betas=adamw.betas, eps=adamw.eps, weight_decay=adamw.weight_decay)
    for gradient in gradients:
        singles = [p.detach().float().requires_grad_() for p in doubles]
        fake_quant(*singles, bits, group_size, impl="reference").backward(gradient.float())
        for double, single in zip(doubles, singles, strict=True):
            double.grad = single.grad.double()
        optimizer.step()
    return [p.detach() for p in doubles]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("bits", "group_size", "rows", "columns", "dtype", "frozen"),
    [
        (2, 64, 5, 192, torch.bfloat16, ()),
        (3, 32, 7, 96, torch.float16, (0,)),
        (3, 128, 7, 256, torch.bfloat16, (1,)),
        (4, -1, 3, 2500, torch.bfloat16, (2,)),
        (4, -1, 3, 2500, torch.float16, ()),
        (8, 48, 3, 144, torch.float32, (1, 2)),
    ],
)
def test_a_few_steps_are_torchs_adamw(
    bits: int,
    group_size: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    frozen: tuple[int, ...],
    impl: str,
    kernel_device: torch.device,
) -> None:
    adamw = AdamW(weight_decay=0.01)
    parameters = _parameters(bits, group_size, rows, columns)
    gradients = _gradients(parameters[0].shape, dtype)
    expected = _by_torch(parameters, gradients, adamw, bits, group_size, frozen)
    actual = [tensor.to(kernel_device, copy=True) for tensor in parameters]
    moments = _moments(actual, frozen)
    dequantized = torch.full((rows, columns), torch.nan, dtype=dtype, device=kernel_device)
    schedule = torch.tensor([schedule_row(step, RATES, adamw) for step in range(STEPS)], device=kernel_device)
    for step, gradient in enumerate(gradients):
        fake_quant_adamw_(
            *actual, gradient.to(kernel_device), dequantized, moments, schedule,
            torch.tensor(step, device=kernel_device), adamw, bits, group_size, impl=impl,
        )  # fmt: skip
    for index, (ours, theirs, before) in enumerate(zip(actual, expected, parameters, strict=True)):
        assert torch.equal(ours.cpu(), before) == (index in frozen)
        # what was changed, to a few of fp32's roundings of the values themselves
        assert relative_error(ours.cpu(), theirs) < 1e-6
    assert torch.equal(dequantized, fake_quant(*actual, bits, group_size, dtype=dtype, impl="reference"))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_zeros_outside_their_range_are_held_there_and_still_move(impl: str, kernel_device: torch.device) -> None:
    weight, scales, zeros = (tensor.to(kernel_device) for tensor in _parameters(2, 32, 4, 64))
    zeros[:, 0], zeros[:, 1] = -1.0, 5.0
    before = zeros.clone()
    adamw = AdamW()
    dequantized = torch.empty_like(weight)
    fake_quant_adamw_(
        weight, scales, zeros, torch.ones_like(weight), dequantized, (None, None, Moments.of(zeros)),
        torch.tensor([schedule_row(0, RATES, adamw)], device=kernel_device),
        torch.zeros((), dtype=torch.int64, device=kernel_device), adamw, 2, 32, zero_range=(1, 2), impl=impl,
    )  # fmt: skip
    held = before.clamp(1, 2)
    assert torch.equal(dequantized, fake_quant(weight, scales, held, 2, 32, impl="reference"))
    assert bool((zeros != before).all())


def test_wrong_tensors_are_named() -> None:
    weight, scales, zeros = _parameters(2, 32, 4, 64)
    adamw, nothing = AdamW(), (None, None, None)
    schedule, step = torch.tensor([schedule_row(0, RATES, adamw)]), torch.tensor(0)
    rest = (nothing, schedule, step, adamw, 2, 32)
    with pytest.raises(InputError, match=r"weight: torch.float64 \[4, 64\]; expected contiguous torch.float32"):
        fake_quant_adamw_(weight.double(), scales, zeros, weight, weight.clone(), *rest)
    with pytest.raises(InputError, match=r"scales: torch.float32 \[4, 1\]"):
        fake_quant_adamw_(weight, scales[:, :1], zeros, weight, weight.clone(), *rest)
    with pytest.raises(InputError, match=r"gradient is \[4, 32\]"):
        fake_quant_adamw_(weight, scales, zeros, weight[:, :32], weight.clone(), *rest)
    with pytest.raises(InputError, match="scales' first moments"):
        moments = (None, Moments.of(weight), None)
        fake_quant_adamw_(weight, scales, zeros, weight, weight.clone(), moments, *rest[1:])
