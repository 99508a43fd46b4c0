"""Cross-entropy in place and in pieces against F.cross_entropy in float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eqat_train.e2e_qp import head as head_module
from eqat_train.e2e_qp.head import Head, find_head, head_loss
from eqat_train.ops.cross_entropy import cross_entropy_
from eqat_train.ops.tolerances import relative_error, within_tolerance
from formats.errors import InputError
from tests.tiny_models import ARCHITECTURES, save_tiny_model, tiny_tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def expected_loss_and_gradient(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().double().requires_grad_()
    values = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(values, targets, ignore_index=-100, reduction="none") * scale
    losses.sum().backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


def make_rows(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocabulary, generator=generator) * 4).to(device, dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).to(device)
    targets[rows // 2 :: 3] = -100
    return logits, targets


def held(ours: Tensor, losses: Tensor, logits: Tensor, gradient: Tensor, dtype: torch.dtype) -> None:
    for result, actual, expected in (("losses", ours, losses), ("grad", logits, gradient)):
        good, text = within_tolerance("cross_entropy", result, dtype, actual, expected)
        assert good, text


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 37), (3, 9001)])
def test_reference(shape: tuple[int, int], dtype: torch.dtype, softcap: float | None) -> None:
    logits, targets = make_rows(*shape, dtype, torch.device("cpu"))
    losses, gradient = expected_loss_and_gradient(logits, targets, 0.25, softcap)
    ours = cross_entropy_(logits, targets, scale=0.25, softcap=softcap, impl="reference")
    assert ours.dtype == torch.float32
    held(ours, losses, logits, gradient, dtype)


def test_reference_in_float64() -> None:
    logits, targets = make_rows(7, 37, torch.float64, torch.device("cpu"))
    losses, gradient = expected_loss_and_gradient(logits, targets, 0.25, 30.0)
    ours = cross_entropy_(logits, targets, scale=0.25, softcap=30.0, impl="reference")
    assert ours.dtype == torch.float64
    assert relative_error(ours, losses) < 1e-14 and relative_error(logits, gradient) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 37), (3, 9001), (5, 4096)])
def test_kernel(shape: tuple[int, int], dtype: torch.dtype, kernel_device: torch.device) -> None:
    logits, targets = make_rows(*shape, dtype, kernel_device)
    logits[1, :5] = -torch.inf  # a masked token
    targets[1] = shape[1] - 1
    losses, gradient = expected_loss_and_gradient(logits, targets, 0.25, None)
    ours = cross_entropy_(logits, targets, scale=0.25, impl="triton")
    held(ours, losses, logits, gradient, dtype)
    assert not logits[targets < 0].any()


def test_a_row_without_a_target_costs_nothing_even_if_it_is_not_finite(kernel_device: torch.device) -> None:
    for impl in ("reference", "triton"):
        logits = torch.full((2, 9), torch.nan, device=kernel_device)
        losses = cross_entropy_(logits, torch.tensor([-100, 3], device=kernel_device), impl=impl)
        assert losses[0] == 0 and not logits[0].any()
        assert losses[1].isnan() and logits[1].isnan().all()


def test_what_the_kernel_does_not_hold_is_refused(kernel_device: torch.device) -> None:
    logits, targets = make_rows(4, 9, torch.float32, kernel_device)
    with pytest.raises(InputError, match="does not cap"):
        cross_entropy_(logits, targets, softcap=30.0, impl="triton")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_pieces_give_the_loss_and_the_gradient_of_the_whole(
    bias: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 50, bias=bias).double().requires_grad_(False)
    targets = torch.randint(0, 50, (23,))
    targets[::4] = -100
    whole, ours = (torch.randn(23, 16, generator=torch.Generator().manual_seed(1)).double() for _ in range(2))
    whole.requires_grad_()
    ours.requires_grad_()
    logits = linear(whole)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") * 0.1
    expected.backward()
    monkeypatch.setitem(head_module.PIECE, "cpu", 50 * 8 * 5)  # five tokens
    loss = head_loss(Head(linear, softcap), ours, targets, 0.1)
    (3 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.grad, 3 * whole.grad, rtol=1e-12, atol=1e-15)


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.PIECE, "cpu", 50 * 4 * 5)
    sizes = []
    kept = head_module.cross_entropy_

    def watch(logits: Tensor, *args: object, **kwargs: object) -> Tensor:
        sizes.append(logits.shape[0])
        return kept(logits, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(head_module, "cross_entropy_", watch)
    linear = nn.Linear(16, 50, bias=False).requires_grad_(False)
    with torch.no_grad():
        head_loss(Head(linear, None), torch.randn(12, 16), torch.zeros(12, dtype=torch.long), 1.0)
    assert sizes == [5, 5, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_head(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path, architecture)).requires_grad_(False).eval()
    head = find_head(model, tiny_tokens(2))
    assert head is not None and head.linear is model.get_output_embeddings()
    assert (head.softcap is None) == (architecture != "gemma2")


def test_a_model_that_does_more_with_its_logits_keeps_its_own_loss(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path)).requires_grad_(False).eval()
    model.lm_head.register_forward_hook(lambda *values: None)
    assert find_head(model, tiny_tokens(2)) is not None
    scaled = AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False).eval()
    forward = scaled.forward

    def doubled(**arguments: object) -> object:
        outputs = forward(**arguments)
        outputs.logits = outputs.logits * 2
        return outputs

    scaled.forward = doubled
    assert find_head(scaled, tiny_tokens(2)) is None
    trained = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert find_head(trained, tiny_tokens(2)) is None  # a head that is trained needs its own gradient


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [32000, 128256, 151937])
def test_full_size(vocabulary: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    test_kernel((500, vocabulary), dtype, kernel_device)
