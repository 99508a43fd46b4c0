"""The distillation loss in place of the logits, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eqat_train.ops.distillation import distillation_
from eqat_train.ops.tolerances import within_tolerance
from formats.errors import InputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def expected(
    logits: Tensor, teacher: Tensor, targets: Tensor, share: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    logits, teacher = logits.detach().double().requires_grad_(), teacher.double()
    values, wanted = (part if cap is None else cap * torch.tanh(part / cap) for part in (logits, teacher))
    divergence = F.kl_div(values.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none").sum(1)
    hard = F.cross_entropy(values, targets, ignore_index=-100, reduction="none")
    losses = torch.where(targets >= 0, share * divergence + (1 - share) * hard, 0.0) * 0.25
    losses.sum().backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


def rows(count: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    student, teacher = (torch.randn(count, vocabulary, generator=generator) * 3 for _ in range(2))
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    targets[count // 2 :: 3] = -100
    return student.to(device, dtype), teacher.to(device, dtype), targets.to(device)


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("impl", "softcap"), [("reference", None), ("reference", 30.0), ("triton", None)])
def test_losses_and_gradient(
    impl: str, softcap: float | None, dtype: torch.dtype, share: float, kernel_device: torch.device
) -> None:
    device = kernel_device if impl == "triton" else torch.device("cpu")
    for shape in ((7, 37), (3, 4099)):
        student, teacher, targets = rows(*shape, dtype, device)
        before = teacher.clone()
        losses, gradient = expected(student, teacher, targets, share, softcap)
        ours = distillation_(student, teacher, targets, share=share, scale=0.25, softcap=softcap, impl=impl)
        for result, actual, wanted in (("losses", ours, losses), ("grad", student, gradient)):
            good, text = within_tolerance("distillation", result, dtype, actual, wanted)
            assert good, text
        assert torch.equal(teacher, before) and not student[targets < 0].any() and not ours[targets < 0].any()


def test_the_kernel_refuses_what_it_does_not_compute(kernel_device: torch.device) -> None:
    student, teacher, targets = rows(3, 9, torch.float32, kernel_device)
    with pytest.raises(InputError, match="does not cap logits"):
        distillation_(student, teacher, targets, softcap=30.0, impl="triton")
    with pytest.raises(InputError, match="one of float16, bfloat16 and float32"):
        distillation_(student, teacher.half(), targets, impl="triton")
