"""fake_quant: the numbers of formats.affine, and straight-through gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqat_train.ops.fake_quant import fake_quant, stored_scales, stored_zeros
from formats import QuantizedLinear, QuantScheme, dequantize, quantize
from formats.errors import InputError

SCALE_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def _case(bits: int, rows: int, groups: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights whose steps are clear of rounding ties, some far outside the range; zeros outside 0..maxq too."""
    generator = torch.Generator().manual_seed(seed)
    maxq = 2**bits - 1
    scales = torch.rand(rows, groups, generator=generator) * 0.1 + 0.01
    zeros = torch.rand(rows, groups, generator=generator) * (maxq + 4) - 2
    steps = torch.randint(-maxq - 3, maxq + 4, (rows, groups, width), generator=generator)
    fraction = torch.rand(rows, groups, width, generator=generator) * 0.8 - 0.4
    stored = stored_scales(scales, torch.bfloat16).float()  # coarsest: all dtypes stay clear of ties
    weight = ((steps + fraction) * stored.unsqueeze(2)).reshape(rows, groups * width)
    return weight, stored, zeros


def _round_ste(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    return x + (x.clamp(low, high) - x).detach()


def _float64_definition(
    weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, width: int, scale_dtype: torch.dtype
) -> Tensor:
    """The paper's quantizer in float64, its gradients left to autograd."""
    limits = torch.finfo(scale_dtype)
    s = _clamp_ste(scales, limits.tiny, limits.max)
    s = (s + (s.to(scale_dtype).double() - s).detach()).unsqueeze(2)
    z = _clamp_ste(_round_ste(zeros), 0, 2**bits - 1).unsqueeze(2)
    w = weight.reshape(weight.shape[0], -1, width)
    q = (_round_ste(w / s) + z).clamp(0, 2**bits - 1)
    return ((q - z) * s).reshape(weight.shape)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_forward_and_gradients_match_a_float64_straight_through_definition(bits: int, scale_dtype: torch.dtype) -> None:
    rows, groups, width = 5, 3, 16
    tensors = _case(bits, rows, groups, width, seed=bits)
    single = [tensor.clone().requires_grad_() for tensor in tensors]
    double = [tensor.double().requires_grad_() for tensor in tensors]
    upstream = torch.randn(rows, groups * width, generator=torch.Generator().manual_seed(1))
    actual = fake_quant(*single, bits, width, scale_dtype)
    expected = _float64_definition(*double, bits, width, scale_dtype)
    actual.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    for name, ours, theirs in zip(("weight", "scales", "zeros"), single, double, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        # sums of 16 fp32 products of size at most 2**bits
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5 * 2**bits, msg=name)


def test_clipped_weights_get_no_gradient_and_their_group_gets_the_finite_difference() -> None:
    weight = torch.tensor([[5.0, -5.0, 4.0, 3.5]])  # every code is clipped
    scales, zeros = torch.tensor([[0.5]]), torch.tensor([[1.0]])
    upstream = torch.tensor([[1.0, -2.0, 0.5, 3.0]])

    def value(s: Tensor, z: Tensor) -> Tensor:
        return (fake_quant(weight, s, z, 2, -1, torch.float32) * upstream).sum()

    leaves = [tensor.clone().requires_grad_() for tensor in (weight, scales, zeros)]
    (fake_quant(*leaves, 2, -1, torch.float32) * upstream).sum().backward()
    by_scale = (value(scales + 2**-8, zeros) - value(scales - 2**-8, zeros)) * 2**7
    by_zero = value(scales, zeros + 1) - value(scales, zeros)
    weight_grad, scale_grad, zero_grad = (leaf.grad for leaf in leaves)
    assert torch.equal(weight_grad, torch.zeros(1, 4))
    torch.testing.assert_close(scale_grad.squeeze(), by_scale)
    torch.testing.assert_close(zero_grad.squeeze(), by_zero)


def test_weights_inside_the_range_pass_their_gradient_and_leave_the_zero_point_alone() -> None:
    weight = torch.tensor([[0.3, 0.9, -0.4, 0.1]], requires_grad=True)
    scales = torch.tensor([[0.5]], requires_grad=True)
    zeros = torch.tensor([[1.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    fake_quant(weight, scales, zeros, 2, 4).backward(upstream)
    assert torch.equal(weight.grad, upstream)
    assert torch.equal(zeros.grad, torch.zeros(1, 1))
    steps = weight.detach() / 0.5
    torch.testing.assert_close(scales.grad.squeeze(), (upstream * (steps.round() - steps)).sum())


@settings(deadline=None, max_examples=80)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    width=st.sampled_from([1, 3, 8, 32, 37]),
    whole_row=st.booleans(),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    size=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e5]),
    seed=st.integers(0, 2**16),
)
def test_forward_is_bit_for_bit_the_dequantized_packed_layer(
    bits: int,
    rows: int,
    groups: int,
    width: int,
    whole_row: bool,
    scale_dtype: torch.dtype,
    size: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if whole_row:
        groups, width = 1, groups * width
    weight = torch.randn(rows, groups * width, generator=generator) * size
    scales = torch.randn(rows, groups, generator=generator) * size  # negative and vanishing ones too
    zeros = torch.randn(rows, groups, generator=generator) * 2**bits  # far outside the range too
    scheme = QuantScheme(bits, -1 if whole_row else width)
    stored = stored_scales(scales, scale_dtype)
    integers = stored_zeros(zeros, bits).to(torch.int32)
    layer = QuantizedLinear(quantize(weight, stored, integers, scheme), stored, integers, scheme)
    assert torch.equal(fake_quant(weight, scales, zeros, bits, scheme.group_size, scale_dtype), dequantize(layer))


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass() -> None:
    weight, scales, zeros = [tensor.requires_grad_() for tensor in _case(2, 4, 2, 8, seed=0)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fake_quant(weight, scales, zeros, 2, 8)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > scales.numel()} == {weight.data_ptr()}


def test_gradients_stay_finite_where_a_scale_vanishes() -> None:
    weight = torch.full((1, 4), 5.0, requires_grad=True)
    scales = torch.zeros(1, 1, requires_grad=True)
    zeros = torch.ones(1, 1, requires_grad=True)
    fake_quant(weight, scales, zeros, 2, 4, torch.float32).sum().backward()
    assert all(tensor.grad is not None and torch.isfinite(tensor.grad).all() for tensor in (weight, scales, zeros))


def test_frozen_parameters_get_no_gradient() -> None:
    weight, scales, zeros = _case(2, 4, 2, 8, seed=0)
    scales.requires_grad_()
    fake_quant(weight, scales, zeros, 2, 8).sum().backward()
    assert scales.grad is not None and weight.grad is None and zeros.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 5}, "group_size 5 does not divide in_features 16"),
        ({"scales": torch.ones(4, 3)}, r"scales are torch.float32 \[4, 3\]; expected torch.float32 \[4, 2\]"),
        ({"zeros": torch.ones(4, 2, dtype=torch.int32)}, "zeros are torch.int32"),
        ({"impl": "cuda"}, "impl is 'cuda'; allowed are auto, reference, triton"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    weight, scales, zeros = _case(2, 4, 2, 8, seed=0)
    arguments = {"weight": weight, "scales": scales, "zeros": zeros, "bits": 2, "group_size": 8, **change}
    with pytest.raises(InputError, match=message):
        fake_quant(**arguments)
