"""Loops that were tried beside E2E-QAT's own and not kept: rows of ``ablation.yaml`` name them as ``loop``.

Each differs from :class:`eqat_train.e2e_qat.trainer.QatTrainer` in one thing; start, data, schedule, rounding and
checkpoint are its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eqat_train.e2e_qat.run
from benchmarks.recipes.error_compensation import compensated
from eqat_train.block_ap.fake_quant_linear import FakeQuantLinear
from eqat_train.data import NO_LOSS, TokenWindows
from eqat_train.e2e_qat.trainer import QatTrainer

__all__ = ["LOOPS", "training_by"]


class _OnLogits(QatTrainer):
    """A loss of whole logits, ``[tokens, vocabulary]`` each."""

    def _loss(self, ids: Tensor, labels: Tensor, head: Any, scale: float) -> Tensor:
        targets = F.pad(labels[:, 1:], (0, 1), value=NO_LOSS) != NO_LOSS
        student = self.latent.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        with torch.no_grad():
            teacher = self.teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
        logits, wanted = (out.logits[targets].float().log_softmax(-1) for out in (student, teacher))
        return scale * len(logits) * self._divergence(logits, wanted) + scale * len(logits) * self._hidden(
            student.hidden_states, teacher.hidden_states
        )

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over the tokens, of log-probabilities."""
        return _kl(student, teacher)

    def _hidden(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        return student[0].new_zeros(())


class JensenShannon(_OnLogits):
    """JSD in place of the Kullback-Leibler divergence."""

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        middle = torch.logaddexp(student, teacher) - math.log(2)
        return (_kl(middle, teacher) + _kl(middle, student)) / 2


class Temperature(_OnLogits):
    """Both distributions at temperature 2; the divergence is multiplied by its square, as its gradient asks for."""

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 4 * _kl((student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1))


class HiddenStates(_OnLogits):
    """Every block's output is compared too: the squared error relative to the full-precision model's power."""

    def _hidden(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        # the first are the embeddings, the last have passed the final norm
        pairs = zip(student[1:-1], teacher[1:-1], strict=True)
        errors = [F.mse_loss(ours.float(), t.float()) / t.float().square().mean() for ours, t in pairs]
        return torch.stack(errors).mean()


class Muon(QatTrainer):
    """Weights by Muon, its steps as large as AdamW's; scales, zero-points and norms by AdamW."""

    def _optimizer(self) -> torch.optim.Optimizer:
        weights, *others = self.latent.groups
        muon = torch.optim.Muon([weights], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
        return _Together(muon, adam)  # type: ignore[return-value]


class Averaged(QatTrainer):
    """What is written is a moving average of the second half's parameters, over some 50 steps."""

    DECAY = 0.98

    def train(self, data: TokenWindows, val: TokenWindows | None) -> None:
        self._steps = self.settings.epochs * math.ceil(len(data) / self.settings.batch_size)
        self._mean: list[Tensor] | None = None
        super().train(data, val)
        assert self._mean is not None
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.latent.parameters], self._mean)
        self.latent.take_masters()

    def _step(self, *given: Any) -> Tensor:
        values = super()._step(*given)
        now = [parameter.detach() for parameter in self.latent.parameters]
        if self._mean is not None:
            torch._foreach_lerp_(self._mean, now, 1 - self.DECAY)
        elif len(self.losses) >= self._steps // 2:
            self._mean = [parameter.clone() for parameter in now]
        return values


class FrozenCodes(QatTrainer):
    """Weights and zero-points stand still in the last 15 % of the steps."""

    def train(self, data: TokenWindows, val: TokenWindows | None) -> None:
        self._steps = self.settings.epochs * math.ceil(len(data) / self.settings.batch_size)
        super().train(data, val)

    def _step(self, *given: Any) -> Tensor:
        if len(self.losses) >= 0.85 * self._steps:
            for linear in self.latent.linears.values():
                linear.weight.requires_grad_(False)
                linear.zeros.requires_grad_(False)
        return super()._step(*given)


class ErrorCompensation(QatTrainer):
    """Weights start where GPTQ would round them to, by the full-precision model's inputs of 64 windows."""

    WINDOWS = 64

    def train(self, data: TokenWindows, val: TokenWindows | None) -> None:
        hessians = self._hessians(data.take(torch.arange(min(self.WINDOWS, len(data)))))
        for name, linear in self.latent.linears.items():
            _, scales, zeros = linear.stored()
            grid = scales.float(), zeros.float(), linear.scheme.maxq
            linear.weight.data.copy_(compensated(linear.weight.data, *grid, hessians.pop(name)))
        super().train(data, val)

    @torch.no_grad()
    def _hessians(self, data: TokenWindows) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        layers = {name: self.teacher.get_submodule(name) for name in self.latent.linears}
        hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
        for batch in data.batches(self.micro_batch_size):
            self.teacher.base_model(input_ids=batch.input_ids.to(self.device), use_cache=False)
        for hook in hooks:
            hook.remove()
        return sums


class SoftRounding(QatTrainer):
    """Soft rounding (arXiv 2006.09952) that hardens from step to step and is exact in the last quarter.

    The gradient is the same straight-through one.
    """

    SHARPNESS, SHARE = (1.0, 32.0), 0.75

    def train(self, data: TokenWindows, val: TokenWindows | None) -> None:
        self._steps = self.settings.epochs * math.ceil(len(data) / self.settings.batch_size)
        self._sharpness: float | None = None
        for linear in self.latent.linears.values():
            linear.quantize_dequantize = partial(self._softened, linear, linear.quantize_dequantize)  # type: ignore[method-assign]
        super().train(data, val)

    def _step(self, *given: Any) -> Tensor:
        (low, high), done = self.SHARPNESS, len(self.losses) / (self.SHARE * self._steps)
        self._sharpness = low * (high / low) ** done if done < 1 else None
        values = super()._step(*given)
        self._sharpness = None  # what is validated and written is rounded
        return values

    def _softened(self, linear: FakeQuantLinear, exact: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> Tensor:
        weight = exact(dtype)
        if self._sharpness is None:
            return weight
        with torch.no_grad():
            _, scales, zeros = linear.stored()
            s, z = scales.float().unsqueeze(2), zeros.unsqueeze(2)
            place = (linear.weight.unflatten(1, (scales.shape[1], -1)) / s + z).clamp(0, linear.scheme.maxq)
            way = place - place.floor() - 0.5
            soft = torch.tanh(self._sharpness * way) / (2 * math.tanh(self._sharpness / 2)) + 0.5
            # how far from the nearest code the soft value is
            off = soft - (way >= 0).float()
            correction = (off * s).flatten(1).to(dtype)
        return weight + correction


class _Together:
    """Two optimizers of different parameters as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = list(chain.from_iterable(optimizer.param_groups for optimizer in optimizers))

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


LOOPS: dict[str, Callable[..., QatTrainer]] = {
    "JSD": JensenShannon,
    "temperature 2": Temperature,
    "hidden states": HiddenStates,
    "Muon": Muon,
    "averaged": Averaged,
    "codes frozen": FrozenCodes,
    "error compensation": ErrorCompensation,
    "soft rounding": SoftRounding,
}


@contextmanager
def training_by(loop: str | None) -> Iterator[None]:
    """E2E-QAT runs the named loop inside of this; None leaves its own."""
    if loop is None:
        yield
        return
    with mock.patch.object(eqat_train.e2e_qat.run, "QatTrainer", LOOPS[loop]):
        yield
