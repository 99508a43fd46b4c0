"""The fake_quant kernels: the reference's bits forward, gradients against float64, every element written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eqat_train.ops.fake_quant import fake_quant, stored_scales, stored_zeros
from eqat_train.ops.tolerances import within_tolerance
from formats import QuantizedLinear, QuantScheme, dequantize, quantize
from tests.interpreter import rounding_to_bfloat16

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# bits, group_size, rows, columns: every usual width, whole rows beyond a tile, widths and rows that fit nothing
SHAPES = [
    (2, 64, 5, 192), (2, 32, 67, 96), (3, 128, 3, 256), (4, -1, 3, 2500), (8, -1, 2, 40), (2, 48, 7, 144),
    (1, 1, 3, 7), (4, 64, 1, 64),
]  # fmt: skip


@pytest.fixture(autouse=True)
def rounding(kernel_device: torch.device) -> Iterator[None]:
    with rounding_to_bfloat16():
        yield


def _case(bits: int, group_size: int, rows: int, columns: int, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Weights in and far outside the range, scales that vanish or are negative, zeros outside 0..maxq."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // (columns if group_size == -1 else group_size)
    weight = torch.randn(rows, columns, generator=generator)
    scales = torch.rand(rows, groups, generator=generator) * 4 / 2**bits - 0.02
    zeros = torch.rand(rows, groups, generator=generator) * (2**bits + 3) - 2
    return [tensor.to(device) for tensor in (weight, scales, zeros)]


def _float64_gradients(
    case: list[Tensor], bits: int, scale_dtype: torch.dtype, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By the formulas of the reference's docstring; only codes are fp32's, which decide ties."""
    weight, scales, zeros = case
    limits, grouped = torch.finfo(scale_dtype), (*scales.shape, -1)
    s = scales.clamp(limits.tiny, limits.max).to(scale_dtype).float().unsqueeze(2)
    z = zeros.round().clamp(0, 2**bits - 1).unsqueeze(2)
    r = (weight.reshape(grouped) / s).round() + z
    q = r.clamp(0, 2**bits - 1)
    m, g, s, z = (r == q).double(), gradient.double().reshape(grouped), s.double(), z.double()
    t = weight.double().reshape(grouped) / s
    return (g * m).view_as(weight), (g * (q.double() - z - m * t)).sum(2), (g * (m - 1) * s).sum(2)


# every pair of dtypes, each with two of the shapes
CASES = [
    (*SHAPES[(3 * i + j + k) % len(SHAPES)], scale_dtype, dtype)
    for i, scale_dtype in enumerate(DTYPES)
    for j, dtype in enumerate(DTYPES)
    for k in (0, 4)
]


@pytest.mark.parametrize(("bits", "group_size", "rows", "columns", "scale_dtype", "dtype"), CASES)
def test_forward_is_the_packed_layer_and_gradients_are_float64s(
    bits: int,
    group_size: int,
    rows: int,
    columns: int,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    kernel_device: torch.device,
) -> None:
    _check(_case(bits, group_size, rows, columns, kernel_device), bits, group_size, scale_dtype, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [(2, 64, torch.bfloat16), (3, 128, torch.float16), (4, 32, torch.bfloat16), (8, -1, torch.float32)],
)
def test_a_real_layer_too(bits: int, group_size: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    _check(_case(bits, group_size, 11008, 4096, kernel_device), bits, group_size, torch.float16, dtype)


def _check(case: list[Tensor], bits: int, group_size: int, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in case]
    output = fake_quant(*leaves, bits, group_size, scale_dtype, dtype, impl="triton")
    scheme = QuantScheme(bits, group_size)
    scales, zeros = stored_scales(case[1], scale_dtype), stored_zeros(case[2], bits).int()
    layer = QuantizedLinear(quantize(case[0], scales, zeros, scheme).cpu(), scales.cpu(), zeros.cpu(), scheme)
    assert output.dtype == dtype
    assert torch.equal(output.cpu(), dequantize(layer).to(dtype))
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    output.backward(gradient)
    expected = _float64_gradients(case, bits, scale_dtype, gradient)
    for name, leaf, want in zip(("weight", "scales", "zeros"), leaves, expected, strict=True):
        good, text = within_tolerance("fake_quant", "grad", dtype, leaf.grad, want)
        assert good, f"{name}: {text}"


def test_every_element_is_written(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_like = torch.empty_like

    def poisoned(*arguments: object, **options: object) -> Tensor:
        return empty_like(*arguments, **options).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    leaves = [tensor.requires_grad_() for tensor in _case(2, 48, 37, 144, kernel_device)]
    output = fake_quant(*leaves, 2, 48, impl="triton")
    output.sum().backward()
    assert output.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves)


def test_nan_and_infinity_are_not_hidden(kernel_device: torch.device) -> None:
    weight, scales, zeros = _case(2, 32, 4, 64, kernel_device)
    weight[0, 3], weight[1, 4], scales[2, 0], zeros[3, 1] = torch.nan, torch.inf, torch.nan, torch.nan
    outputs = [fake_quant(weight, scales, zeros, 2, 32, impl=impl) for impl in ("reference", "triton")]
    assert torch.equal(outputs[0].isnan(), outputs[1].isnan())
    assert torch.equal(outputs[0].nan_to_num(), outputs[1].nan_to_num())


def test_weights_on_ties_get_the_references_codes(kernel_device: torch.device) -> None:
    steps = torch.arange(-9, 9).add(0.5).repeat(4, 1)
    scales = torch.tensor([[0.1], [0.3], [0.7], [1.0]]).half().float()
    weight = torch.cat([steps * scales, torch.nextafter(steps * scales, torch.zeros(())), -steps * scales], 1)
    zeros = torch.tensor([[4.0], [7.5], [8.5], [3.0]])
    case = [tensor.to(kernel_device) for tensor in (weight, scales, zeros)]
    assert torch.equal(fake_quant(*case, 4, -1, impl="triton"), fake_quant(*case, 4, -1, impl="reference"))


def test_frozen_parameters_get_no_gradient(kernel_device: torch.device) -> None:
    for trained in range(3):
        leaves = [t.requires_grad_(i == trained) for i, t in enumerate(_case(2, 32, 4, 64, kernel_device))]
        fake_quant(*leaves, 2, 32, impl="triton").sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == trained for i in range(3)]


def test_strided_weights_and_gradients(kernel_device: torch.device) -> None:
    weight, scales, zeros = _case(2, 32, 6, 64, kernel_device)
    strided = weight.repeat(1, 2)[:, :64].requires_grad_()
    output = fake_quant(strided, scales, zeros, 2, 32, impl="triton")
    output.backward(torch.ones(64, 6, device=kernel_device).T)
    plain = weight.clone().requires_grad_()
    fake_quant(plain, scales, zeros, 2, 32, impl="reference").sum().backward()
    assert torch.equal(strided.grad, plain.grad)
