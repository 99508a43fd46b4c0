"""The scale-gradient kernel against the sum written out in float64: interpreted, and compiled at full size on a GPU."""

import pytest
import torch
from torch import Tensor

from eqat_train.ops.packed import PackedWeight
from eqat_train.ops.scale_grad import scale_grad
from eqat_train.ops.tolerances import within_tolerance
from formats.errors import InputError
from tests.packed_reference import PackedCase, make_case


def written_out(x: Tensor, grad: Tensor, case: PackedCase) -> Tensor:
    terms = (grad.double().flatten(0, -2).t() @ x.double().flatten(0, -2)) * case.centered().to(x.device)
    index = case.index.to(x.device)
    return (
        torch.zeros(terms.shape[0], case.scales.shape[0], dtype=torch.float64, device=x.device)
        .index_add_(1, index, terms)
        .t()
    )


def on_device(packed: PackedWeight, device: torch.device) -> PackedWeight:
    return PackedWeight(
        packed.qweight.to(device), packed.qzeros.to(device), packed.bits, packed.group_size, packed.in_features
    )


def check(case: PackedCase, tokens: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    out_features, in_features = case.codes.shape
    x = torch.randn(*tokens, in_features, generator=generator).to(device, dtype)
    grad = torch.randn(*tokens, out_features, generator=generator).to(device, dtype)
    ours = scale_grad(x, grad, on_device(case.packed, device), impl="triton")
    assert ours.dtype == torch.float32 and ours.shape == case.scales.shape
    good, text = within_tolerance("scale_grad", "grad", dtype, ours, written_out(x, grad, case))
    assert good, text
    assert torch.equal(ours, scale_grad(x, grad, on_device(case.packed, device), impl="triton"))


@pytest.fixture(autouse=True)
def memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that an element nobody writes is noticed."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("shape", [(37, 256), (136, 520)])
def test_gradient_equals_the_written_out_sum(
    bits: int, group_size: int, shape: tuple[int, int], kernel_device: torch.device
) -> None:
    check(make_case(bits, group_size, *shape), (3, 7), torch.float32, kernel_device)


@pytest.mark.parametrize("shape", [(2, 77), (21, 1), (130, 321)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_odd_shapes(shape: tuple[int, int], dtype: torch.dtype, kernel_device: torch.device) -> None:
    check(make_case(3, 64, *shape), (5,), dtype, kernel_device)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_descriptors_and_plain_loads_agree(bits: int, kernel_device: torch.device) -> None:
    # rows of a multiple of 16 bytes are read through tensor descriptors
    check(make_case(bits, 64, 48, 320), (70,), torch.float16, kernel_device)
    check(make_case(bits, 64, 47, 319), (70,), torch.float16, kernel_device)


@pytest.mark.parametrize("group_size", [256, 512])
def test_groups_longer_than_a_tile(group_size: int, kernel_device: torch.device) -> None:
    check(make_case(4, group_size, 33, 1100), (9,), torch.float16, kernel_device)


def test_the_products_are_not_rounded_before_they_are_summed(kernel_device: torch.device) -> None:
    # dY^T X is 2049 for every weight, which float16 cannot hold
    case = make_case(2, 32, 16, 32)
    x, grad = torch.ones(2049, 32), torch.ones(2049, 16)
    ours = scale_grad(
        x.to(kernel_device).half(), grad.to(kernel_device).half(), on_device(case.packed, kernel_device), impl="triton"
    )
    expected = 2049 * case.centered().sum(dim=1, keepdim=True).t()
    assert torch.equal(ours.cpu().double(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits is 1"),
        ({"group_size": 96}, "group_size is 96"),
        ({"dtype": torch.float64}, "float64"),
        ({"act_order": True}, "act-order"),
    ],
)
def test_what_the_kernel_does_not_hold_is_refused_by_name(
    change: dict[str, object], message: str, kernel_device: torch.device
) -> None:
    values = {"bits": 2, "group_size": 32, "dtype": torch.float32, "act_order": False} | change
    case = make_case(values["bits"], values["group_size"], 16, 192, act_order=values["act_order"])  # type: ignore[arg-type]
    x, grad = (torch.zeros(4, size, dtype=values["dtype"], device=kernel_device) for size in (192, 16))  # type: ignore[call-overload]
    with pytest.raises(InputError, match=message):
        scale_grad(x, grad, case.packed, impl="triton")
    if kernel_device.type == "cpu":
        assert scale_grad(x, grad, case.packed).shape == case.scales.shape


def packed_by_arithmetic(codes: Tensor, bits: int) -> Tensor:
    """int64 ``[rows, values]`` as int32 words ``[rows, words]``, low bits first."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = (padded << (torch.arange(per_word, device=codes.device) * bits)).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 128), (4, 32), (8, -1), (2, -1)])
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008), (1111, 777)])
def test_full_size(bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    out_features, in_features = shape
    torch.manual_seed(0)
    codes = torch.randint(0, 2**bits, shape, device="cuda")
    index = torch.arange(in_features, device="cuda") // (in_features if group_size == -1 else group_size)
    zeros = torch.randint(0, 2**bits, (out_features, int(index[-1]) + 1), device="cuda")
    packed = PackedWeight(
        packed_by_arithmetic(codes, bits).t().contiguous(),
        packed_by_arithmetic(zeros.t().contiguous(), bits),
        bits,
        group_size,
        in_features,
    )
    x, grad = (torch.randn(4, 1031, size, device="cuda").to(dtype) for size in (in_features, out_features))
    terms = (grad.double().flatten(0, 1).t() @ x.double().flatten(0, 1)) * (codes - zeros[:, index])
    expected = terms.new_zeros(zeros.shape).index_add_(1, index, terms).t()
    ours = scale_grad(x, grad, packed, impl="triton")
    good, text = within_tolerance("scale_grad", "grad", dtype, ours, expected)
    assert good, text
    assert torch.equal(ours, scale_grad(x, grad, packed, impl="triton"))
