"""The reference ops on a GPU: the CPU's numbers, and no wait for the device."""

from collections.abc import Iterator

import pytest
import torch

from eqat_train.e2e_qp.quant_linear import QuantLinear
from eqat_train.ops.dequant import dequant
from tests.packed_reference import make_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "act_order"), [(64, False), (-1, False), (64, True), (80, False)])
def test_weights_equal_the_cpus(bits: int, group_size: int, act_order: bool) -> None:
    case = make_case(bits, group_size, 48, 256, act_order=act_order)
    linear = QuantLinear(case.packed, case.scales).cuda()
    weight = dequant(linear.packed_weight(), linear.scales.detach(), torch.bfloat16)
    assert torch.equal(weight.cpu(), case.weight(case.scales.float()).to(torch.bfloat16))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("group_size", "act_order"), [(64, False), (64, True), (80, False)])
def test_forward_and_backward_never_wait(
    bits: int, group_size: int, act_order: bool, request: pytest.FixtureRequest
) -> None:
    case = make_case(bits, group_size, 48, 256, act_order=act_order)
    linear = QuantLinear(case.packed, case.scales).cuda()
    x = torch.randn(2, 64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    linear(x).sum().backward()  # libraries load on first use
    request.getfixturevalue("waiting_is_an_error")
    linear(x).sum().backward()
    assert x.grad is not None and linear.scales.grad is not None
