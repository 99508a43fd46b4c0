"""Starts of scales and zero-points: the search finds what an exhaustive one finds, and stays within what is allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eqat_train.starts import start_parameters
from formats import QuantScheme
from formats.affine import minmax_parameters


def error(weight: np.ndarray, scale: float, zero: int, maxq: int) -> float:
    codes = np.clip(np.rint(weight / scale) + zero, 0, maxq) - zero
    return float(((codes * scale - weight) ** 2).sum())


def errors(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, maxq: int) -> np.ndarray:
    groups = weight.double().view(*scales.shape, -1).numpy()
    return np.array(
        [
            [error(groups[i, j], float(scales[i, j]), int(zeros[i, j]), maxq) for j in range(scales.shape[1])]
            for i in range(scales.shape[0])
        ]
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_is_near_an_exhaustive_one(bits: int) -> None:
    scheme = QuantScheme(bits, 64)
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(bits)) * 0.02
    weight[0, :64] += 0.05  # a group that is all on one side
    scales, zeros = start_parameters(weight, scheme, torch.float16, start="mse")
    found = errors(weight, scales, zeros, scheme.maxq)
    rough = errors(weight, *minmax_parameters(weight, scheme), scheme.maxq)
    ends = (weight.view(6, 2, 64).amax(2) - weight.view(6, 2, 64).amin(2)) / scheme.maxq
    best = np.array(
        [
            [
                min(
                    error(weight.double().view(6, 2, 64)[i, j].numpy(), float(ends[i, j]) * share, zero, scheme.maxq)
                    for share in np.linspace(0.25, 1.3, 200)
                    for zero in range(scheme.maxq + 1)
                )
                for j in range(2)
            ]
            for i in range(6)
        ]
    )
    assert (found <= rough * 1.0001).all()
    assert found.sum() <= 1.05 * best.sum() and (bits > 2 or found.sum() < 0.7 * rough.sum())
    assert torch.equal(zeros, zeros.round()) and 0 <= zeros.min() and zeros.max() <= scheme.maxq


def test_a_range_of_zeros_is_kept_and_constant_groups_stay_finite() -> None:
    scheme = QuantScheme(2, 32)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[1] = 0.0
    weight[2] = 3.0
    scales, zeros = start_parameters(weight, scheme, torch.float16, (1, 2), "mse")
    assert bool(scales.isfinite().all()) and bool((scales > 0).all())
    assert set(zeros.flatten().tolist()) <= {1.0, 2.0}


def test_minmax_is_the_papers() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    scales, zeros = start_parameters(weight, QuantScheme(2, 32), torch.float16)
    expected = minmax_parameters(weight, QuantScheme(2, 32))
    assert torch.equal(scales, expected[0]) and torch.equal(zeros, expected[1].float())
