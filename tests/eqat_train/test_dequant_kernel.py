"""The dequant kernel against the formula, bit for bit: interpreted on a CPU, at full size on a GPU."""

from collections.abc import Iterator

import pytest
import torch

from eqat_train.ops.dequant import dequant
from formats.errors import InputError
from tests.interpreter import rounding_to_bfloat16
from tests.packed_reference import make_case, random_case

pytest.importorskip("triton", reason="needs triton, which has wheels for Linux alone")

from eqat_train.ops.dequant.triton import dequant_into

BITS = [2, 3, 4, 8]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def rounding(kernel_device: torch.device) -> Iterator[None]:
    with rounding_to_bfloat16():
        yield


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("group_size", "act_order"), [(size, False) for size in (32, 64, 128, -1, 5, 80)] + [(32, True)]
)
@pytest.mark.parametrize("shape", [(37, 256), (70, 77)])
def test_weight_equals_the_formula_exactly(
    bits: int, group_size: int, act_order: bool, shape: tuple[int, int], kernel_device: torch.device
) -> None:
    case = make_case(bits, group_size, *shape, act_order=act_order)
    scales = case.scales.float() * 1.0001
    for dtype in DTYPES:
        weight = dequant(case.packed.to(kernel_device), scales.to(kernel_device), dtype, impl="triton")
        assert weight.dtype == dtype and weight.is_contiguous()
        assert torch.equal(weight.cpu(), case.weight(scales).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_scales_as_stored_are_widened_exactly(
    dtype: torch.dtype, stored: torch.dtype, kernel_device: torch.device
) -> None:
    case = make_case(3, 64, 40, 128)
    scales = case.scales.to(stored)
    weight = dequant(case.packed.to(kernel_device), scales.to(kernel_device), dtype, impl="triton")
    assert torch.equal(weight.cpu(), case.weight(scales.float()).to(dtype))


def test_a_slice_is_written_and_nothing_beside_it(kernel_device: torch.device) -> None:
    case = make_case(2, 32, 70, 96)
    scales = case.scales.float()
    buffer = torch.full((44, 96), torch.nan, dtype=torch.float16, device=kernel_device)
    dequant_into(buffer[2:42], case.packed.to(kernel_device), scales.to(kernel_device), 30)
    assert torch.equal(buffer[2:42].cpu(), case.weight(scales).half()[30:])
    assert buffer[:2].isnan().all() and buffer[42:].isnan().all()


@pytest.mark.parametrize(
    ("bits", "dtype", "said"), [(5, torch.float32, "not 5"), (2, torch.float64, "not scales in torch.float64")]
)
def test_what_it_cannot_compute_is_refused(
    bits: int, dtype: torch.dtype, said: str, kernel_device: torch.device
) -> None:
    case = make_case(bits, 32, 16, 64)
    with pytest.raises(InputError, match=said):
        dequant(case.packed.to(kernel_device), case.scales.to(dtype).to(kernel_device), impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_size_weight_equals_the_formula_exactly(bits: int, group_size: int, dtype: torch.dtype) -> None:
    for shape in ((4096, 4096), (11008, 4096), (1000, 5504)):
        case = random_case(bits, group_size, *shape)
        scales = (case.scales * 1.0001).float()
        weight = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
        dequant_into(weight, case.packed, scales, 0)
        assert torch.equal(weight, (case.centered * scales.t().double()[:, case.index]).float().to(dtype))
