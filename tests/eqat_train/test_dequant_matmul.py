"""dequant_matmul, forward and gradients, against float64 autograd through the plain formula."""

import pytest
import torch
from torch import Tensor

from eqat_train.ops.dequant_matmul import dequant_matmul
from tests.packed_reference import PackedCase, make_case


def reference(case: PackedCase, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.einsum("...k,nk->...n", x, case.weight(scales))
    return y if bias is None else y + bias


def leaves(case: PackedCase, in_features: int, with_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, in_features, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(case.codes.shape[0], generator=generator, dtype=torch.float64, requires_grad=True)
    return x, case.scales.clone().requires_grad_(), bias if with_bias else None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("shape", "with_bias"), [((37, 128), True), ((16, 256), False), ((21, 77), True)])
def test_output_and_gradients_match_float64(
    bits: int, group_size: int, shape: tuple[int, int], with_bias: bool
) -> None:
    case = make_case(bits, group_size, *shape)
    check_against_reference(case, shape[1], with_bias)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_act_order_output_and_gradients_match_float64(bits: int) -> None:
    check_against_reference(make_case(bits, 32, 19, 96, act_order=True), 96, True)


def check_against_reference(case: PackedCase, in_features: int, with_bias: bool) -> None:
    x, scales, bias = leaves(case, in_features, with_bias)
    inputs = [x, scales] if bias is None else [x, scales, bias]
    y = dequant_matmul(x, case.packed, scales, bias)
    expected = reference(case, x, scales, bias)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = torch.autograd.grad(y, inputs, grad)
    theirs = torch.autograd.grad(expected, inputs, grad)
    for name, a, b in zip(["x", "scales", "bias"], ours, theirs, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("act_order", [False, True])
def test_gradcheck(act_order: bool) -> None:
    case = make_case(3, 8, 5, 16, act_order=act_order)
    x, scales, bias = leaves(case, 16, True)
    assert torch.autograd.gradcheck(lambda x, s, b: dequant_matmul(x, case.packed, s, b), (x, scales, bias))


def test_float32_equals_a_linear_layer_bit_for_bit() -> None:
    case = make_case(2, 64, 48, 192)
    x = torch.randn(7, 192)
    bias = torch.randn(48)
    scales = case.scales.float()
    y = dequant_matmul(x, case.packed, scales, bias)
    assert torch.equal(y, torch.nn.functional.linear(x, case.weight(scales), bias))


def test_bfloat16_rounds_the_weight_once_and_reduces_in_float32() -> None:
    case = make_case(4, 32, 24, 96)
    x = torch.randn(2, 9, 96).to(torch.bfloat16).requires_grad_()
    scales = case.scales.float().requires_grad_()
    y = dequant_matmul(x, case.packed, scales)
    weight = case.weight(scales.detach()).to(torch.bfloat16)
    assert torch.equal(y, torch.nn.functional.linear(x, weight))
    grad = torch.randn(y.shape).to(torch.bfloat16)
    y.backward(grad)
    product = grad.flatten(0, 1).t() @ x.detach().flatten(0, 1)  # bfloat16 matmul
    terms = product.double() * case.centered()
    expected = torch.zeros(24, 3, dtype=torch.float64).index_add_(1, case.index, terms).t()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert scales.grad is not None and scales.grad.dtype == torch.float32
    torch.testing.assert_close(scales.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_backward_keeps_only_the_input_and_the_scales() -> None:
    case = make_case(2, 64, 64, 256)
    x = torch.randn(3, 256, requires_grad=True)
    scales = case.scales.float().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        dequant_matmul(x, case.packed, scales)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), scales.data_ptr()}


def test_only_the_asked_gradients_are_computed() -> None:
    case = make_case(2, 32, 16, 64)
    scales = case.scales.float().requires_grad_()
    dequant_matmul(torch.randn(4, 64), case.packed, scales).sum().backward()
    assert scales.grad is not None
    x = torch.randn(4, 64, requires_grad=True)
    dequant_matmul(x, case.packed, case.scales.float()).sum().backward()
    assert x.grad is not None
