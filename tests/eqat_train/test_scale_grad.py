"""scale_grad against the sum written out in float64."""

import pytest
import torch

from eqat_train.ops.scale_grad import scale_grad
from tests.packed_reference import make_case


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "act_order"), [(32, False), (64, False), (128, False), (-1, False), (32, True)])
@pytest.mark.parametrize("shape", [(37, 256), (21, 77), (16, 96)])
def test_gradient_equals_the_written_out_sum(
    bits: int, group_size: int, act_order: bool, shape: tuple[int, int]
) -> None:
    out_features, in_features = shape
    case = make_case(bits, group_size, out_features, in_features, act_order=act_order)
    x = torch.randn(3, 5, in_features, dtype=torch.float64)
    grad = torch.randn(3, 5, out_features, dtype=torch.float64)
    ours = scale_grad(x, grad, case.packed)
    terms = torch.einsum("abn,abk->nk", grad, x) * case.centered()
    expected = torch.stack([terms[:, case.index == g].sum(dim=1) for g in range(case.scales.shape[0])])
    assert ours.dtype == torch.float64 and ours.shape == case.scales.shape
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_float32_for_shorter_inputs(dtype: torch.dtype) -> None:
    case = make_case(2, 32, 16, 64)
    grad = scale_grad(torch.randn(4, 64).to(dtype), torch.randn(4, 16).to(dtype), case.packed)
    assert grad.dtype == torch.float32
