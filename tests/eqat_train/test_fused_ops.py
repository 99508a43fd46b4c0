"""Norm, gated activation and rotary embedding, kernels and references, against float64 with autograd's gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eqat_train.ops.add_rms_norm import add_rms_norm
from eqat_train.ops.gated_silu import gated_silu
from eqat_train.ops.gated_silu_grad import gated_silu_grad_
from eqat_train.ops.rotary import rotary
from eqat_train.ops.tolerances import within_tolerance
from formats.errors import InputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def norm(x: Tensor, weight: Tensor, *, impl: str) -> Tensor:
    return add_rms_norm(x, None, weight, 1e-5, impl=impl)[1]


def added_norm(x: Tensor, delta: Tensor, weight: Tensor, *, impl: str) -> Tensor:
    return torch.cat(add_rms_norm(x, delta, weight, 1e-5, impl=impl), dim=-1)


def written_added_norm(x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x + delta, written_norm(x + delta, weight)), dim=-1)


def written_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def written_gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def written_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first = x[..., :half] * cos[..., :half] - x[..., half:] * sin[..., :half]
    second = x[..., half:] * cos[..., half:] + x[..., :half] * sin[..., half:]
    return torch.cat((first, second), dim=-1)


def held(verdict: tuple[bool, str], impl: str) -> None:
    good, text = verdict
    assert good, f"{impl}: {text}"


def compare(
    op: str,
    ours: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    shapes: tuple[tuple[int, ...], ...],
    differentiable: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    wide = [x.double().requires_grad_(i < differentiable) for i, x in enumerate(inputs)]
    result = expected(*wide)
    gradient = torch.randn(result.shape, generator=generator).to(device, dtype)
    gradients = torch.autograd.grad(result, wide[:differentiable], gradient.double())
    for impl in ("reference", "triton"):
        leaves = [x.clone().requires_grad_(i < differentiable) for i, x in enumerate(inputs)]
        y = ours(*leaves, impl=impl)
        assert y.dtype == dtype and y.shape == result.shape
        held(within_tolerance(op, "output", dtype, y, result), impl)
        found = torch.autograd.grad(y, leaves[:differentiable], gradient)
        for grad, wanted in zip(found, gradients, strict=True):
            assert grad.dtype == dtype
            held(within_tolerance(op, "grad", dtype, grad, wanted), impl)
        assert all(torch.equal(x, leaf) for x, leaf in zip(inputs, leaves, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 77), (2, 64), (1, 3)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device) -> None:
    compare("add_rms_norm", norm, written_norm, (shape, shape[-1:]), 1, dtype, kernel_device)
    both = (shape, shape, shape[-1:])
    compare("add_rms_norm", added_norm, written_added_norm, both, 2, dtype, kernel_device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 77), (2, 4096), (1, 5001)])
def test_gated_activation(shape: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device) -> None:
    compare("gated_silu", gated_silu, written_gated_silu, (shape, shape), 2, dtype, kernel_device)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_one_gradient_of_the_gated_activation_takes_the_place_of_the_incoming_one(
    impl: str, kernel_device: torch.device
) -> None:
    gate, up, grad = torch.randn(3, 5, 77, device=kernel_device).unbind()
    wide = [factor.double().requires_grad_() for factor in (gate, up)]
    expected = torch.autograd.grad(written_gated_silu(*wide), wide, grad.double())
    kept = (gate.clone(), up.clone())
    grad_gate, grad_up = gated_silu_grad_(gate, up, grad, impl=impl)
    assert grad_up is grad and torch.equal(gate, kept[0]) and torch.equal(up, kept[1])
    held(within_tolerance("gated_silu", "grad", torch.float32, grad_gate, expected[0]), impl)
    held(within_tolerance("gated_silu", "grad", torch.float32, grad_up, expected[1]), impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "angles"), [((2, 5, 3, 12), 1), ((2, 5, 3, 12), 2), ((1, 7, 1, 64), 1)])
def test_rotary(shape: tuple[int, ...], angles: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    table = (angles, shape[1], shape[3])
    compare("rotary", rotary, written_rotary, (shape, table, table), 1, dtype, kernel_device)


def test_a_transposed_gradient_is_taken(kernel_device: torch.device) -> None:
    x = torch.randn(2, 5, 3, 8, device=kernel_device, requires_grad=True)
    cos, sin = (torch.randn(1, 5, 8, device=kernel_device) for _ in range(2))
    grad = torch.randn(2, 3, 5, 8, device=kernel_device).transpose(1, 2)
    ours, theirs = (torch.autograd.grad(rotary(x, cos, sin, impl=impl), x, grad)[0] for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs)


def test_what_the_kernels_do_not_hold_is_refused(kernel_device: torch.device) -> None:
    x = torch.randn(2, 8, dtype=torch.float64, device=kernel_device)
    with pytest.raises(InputError, match="float64"):
        gated_silu(x, x, impl="triton")
    with pytest.raises(InputError, match="requires a gradient"):
        add_rms_norm(x.float(), None, torch.ones(8, device=kernel_device, requires_grad=True), 1e-5, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_size(dtype: torch.dtype, kernel_device: torch.device) -> None:
    compare("add_rms_norm", norm, written_norm, ((3, 4096, 4096), (4096,)), 1, dtype, kernel_device)
    compare("gated_silu", gated_silu, written_gated_silu, ((2, 4099, 11008), (2, 4099, 11008)), 2, dtype, kernel_device)
    compare(
        "rotary", rotary, written_rotary, ((2, 4099, 32, 128), (1, 4099, 128), (1, 4099, 128)), 1, dtype, kernel_device
    )
