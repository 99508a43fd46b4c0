"""dequant against (q - z) * s of independently packed integers."""

import pytest
import torch

from eqat_train.ops.dequant import dequant
from formats.errors import InputError
from tests.packed_reference import make_case

SHAPES = [(37, 256), (3, 128), (21, 77)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_equals_the_formula_exactly(bits: int, group_size: int, shape: tuple[int, int]) -> None:
    case = make_case(bits, group_size, *shape)
    scales = case.scales.float()
    weight = dequant(case.packed, scales)
    assert weight.dtype == torch.float32 and weight.is_contiguous()
    assert torch.equal(weight, case.weight(scales))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_act_order_takes_the_group_of_each_column(bits: int) -> None:
    case = make_case(bits, 32, 19, 96, act_order=True)
    weight = dequant(case.packed, case.scales, dtype=torch.float64)
    assert torch.equal(weight, case.weight(case.scales))


def test_product_is_float32_and_rounded_once() -> None:
    case = make_case(3, 32, 40, 64)
    scales = case.scales.float() * 1.0001
    weight = dequant(case.packed, scales, dtype=torch.bfloat16)
    assert torch.equal(weight, case.weight(scales).to(torch.bfloat16))


def test_inputs_are_left_alone() -> None:
    case = make_case(2, 32, 16, 64)
    tensors = [case.packed.qweight, case.packed.qzeros, case.scales]
    before = [tensor.clone() for tensor in tensors]
    dequant(case.packed, case.scales)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize(("impl", "said"), [("triton", "use impl='reference'"), ("cuda", "allowed are")])
def test_an_implementation_that_cannot_run_is_refused(impl: str, said: str) -> None:  # no kernel takes float64
    case = make_case(2, 32, 16, 64)
    with pytest.raises(InputError, match=said):
        dequant(case.packed, case.scales, impl=impl)
