"""Loops that the recipes' benchmark tries: each differs from E2E-QAT's own in what it says."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_model
from torch import Tensor

import eqat_train.e2e_qat.run
from benchmarks.recipes.error_compensation import compensated
from benchmarks.recipes.leads import LOOPS, SoftRounding, training_by
from eqat_train.block_ap.fake_quant_linear import FakeQuantLinear
from eqat_train.data import TokenWindows
from eqat_train.e2e_qat.run import QatSettings, run_e2e_qat
from eqat_train.e2e_qat.trainer import QatTrainer
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme


class Watched:
    """What a loop did: parameters after every step, and the loss of the first."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []
        self.written: list[Tensor] = []
        self.losses: tuple[float, ...] = ()


def _train(folder: Path, loop: str | None, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Watched:
    model = save_tiny_model(folder / "model", "llama")
    ids = torch.randint(0, 128, (16, 16), generator=torch.Generator().manual_seed(1))
    data = TokenWindows(ids, ids.clone())
    watched = Watched()
    settings = QatSettings(QuantScheme(2, 32), batch_size=2, device="cpu", **({"lr_weight": 1e-2} | changes))
    with training_by(loop), monkeypatch.context() as patch:
        trainer: type[QatTrainer] = eqat_train.e2e_qat.run.QatTrainer
        step, train = trainer._step, trainer.train

        def stepped(self: QatTrainer, *given: Any) -> Tensor:
            values = step(self, *given)
            watched.steps.append([parameter.detach().clone() for parameter in self.latent.parameters])
            return values

        def trained(self: QatTrainer, *given: Any) -> None:
            train(self, *given)
            watched.written = [parameter.detach().clone() for parameter in self.latent.parameters]
            watched.losses = tuple(self.losses)

        patch.setattr(trainer, "_step", stepped)
        patch.setattr(trainer, "train", trained)
        run_e2e_qat(model, data, settings, folder / "out", work_dir=folder / "work", reporter=Reporter(), force=True)
    return watched


def test_none_is_the_recipes_own_loop_and_nothing_stays_changed() -> None:
    with training_by(None):
        assert eqat_train.e2e_qat.run.QatTrainer is QatTrainer
    for name, loop in LOOPS.items():
        with training_by(name):
            assert eqat_train.e2e_qat.run.QatTrainer is loop
    assert eqat_train.e2e_qat.run.QatTrainer is QatTrainer


def test_losses_of_whole_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jensen-Shannon lies below half of KL's upper bound; hidden states add to the same divergence."""
    own, jsd, hidden = (
        _train(tmp_path / str(i), loop, monkeypatch).losses[0] for i, loop in enumerate((None, "JSD", "hidden states"))
    )
    assert 0 < jsd < own < hidden
    assert jsd < 0.6931  # ln 2, the largest there is


def test_a_moving_average_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _train(tmp_path, "averaged", monkeypatch)
    expected = run.steps[5]  # of 8; losses are known a step late
    for later in run.steps[6:]:
        expected = [mean + 0.02 * (now - mean) for mean, now in zip(expected, later, strict=True)]
    for written, mean in zip(run.written, expected, strict=True):
        torch.testing.assert_close(written, mean)


def test_codes_stand_still_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _train(tmp_path, "codes frozen", monkeypatch, epochs=4)
    changed = [[not torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in pairwise(run.steps)]
    assert all(any(step) for step in changed)
    moving = [sum(step) for step in changed]
    assert len(run.steps) == 32 and len(set(moving[-3:])) == 1 and moving[-1] < min(moving[:-3])


def test_muon_moves_weights_in_directions_of_equal_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _train(tmp_path, "Muon", monkeypatch, epochs=2)
    moved = (run.steps[-8][0] - run.steps[-9][0]).double()
    values = torch.linalg.svdvals(moved)
    # AdamW's step has a few large singular values and many small ones; Newton-Schulz leaves 0.7 to 1.2 of each other
    assert values.max() / values.median() < 3


def optimal_brain_quantizer(
    weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, maxq: int, hessian: np.ndarray
) -> np.ndarray:
    """Codes by the definition: after each column, the columns left are those that least change the output."""
    left, codes = weight.copy(), np.zeros_like(weight)
    for column in range(weight.shape[1]):
        s, z = scale[:, column], zero[:, column]
        codes[:, column] = np.clip(np.round(left[:, column] / s) + z, 0, maxq)
        error = left[:, column] - (codes[:, column] - z) * s
        inverse = np.linalg.inv(hessian[column:, column:])
        left[:, column:] -= np.outer(error / inverse[0, 0], inverse[0])
    return codes


def test_error_compensation_gives_the_codes_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator)
    inputs = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    hessian = inputs.T @ inputs
    scales = torch.rand(6, 2, generator=generator) + 0.5
    zeros = torch.randint(0, 4, (6, 2), generator=generator).float()
    moved = compensated(weight, scales, zeros, 3, hessian)

    whole = [grid.repeat_interleave(16, dim=1) for grid in (scales, zeros)]
    codes = ((moved / whole[0]).round() + whole[1]).clamp(0, 3)
    damped = hessian.double().numpy() + 0.01 * hessian.double().diagonal().mean().item() * np.eye(32)
    expected = optimal_brain_quantizer(weight.double().numpy(), *(g.double().numpy() for g in whole), 3, damped)
    assert np.array_equal(codes.numpy(), expected)
    plain = ((weight / whole[0]).round() + whole[1]).clamp(0, 3)
    assert not torch.equal(codes, plain)


def test_soft_rounding_lies_between_the_weight_and_its_code() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 8)
    layer = FakeQuantLinear(linear, QuantScheme(bits=2, group_size=32), torch.float16)
    exact = layer.quantize_dequantize(torch.float32).detach()
    _, scales, zeros = layer.stored()
    low, high = (-zeros * scales.float(), (3 - zeros) * scales.float())
    weight = linear.weight.detach().clamp(low, high)
    loop = SoftRounding.__new__(SoftRounding)
    results = {}
    for sharpness in (None, 1e-3, 8.0, 1e5):
        loop._sharpness = sharpness
        results[sharpness] = loop._softened(layer, layer.quantize_dequantize, torch.float32).detach()
    assert torch.equal(results[None], exact)
    torch.testing.assert_close(results[1e-3], weight, rtol=0, atol=1e-5)  # hardly rounded at all
    torch.testing.assert_close(results[1e5], exact, rtol=0, atol=1e-4)  # as if rounded
    assert ((results[8.0] - exact).abs() <= (weight - exact).abs() + 1e-6).all()
