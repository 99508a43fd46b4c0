"""The loops of benchmarks/leads.py against definitions written out."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.error_compensation import compensated
from benchmarks.leads import SoftRounding
from eqat_train.block_ap.fake_quant_linear import FakeQuantLinear
from formats import QuantScheme


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
