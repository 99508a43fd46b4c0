"""The reference formula against float64 and element-by-element loops."""

import pytest
import torch

from formats import QuantizedLinear, QuantScheme, dequantize, quantize, round_to_nearest
from formats.affine import minmax_parameters

SHAPES = [(40, 16), (40, -1), (5, 16), (64, 16), (33, 32)]  # (in_features, group_size), ragged ones among them


def weight_by_loops(layer: QuantizedLinear) -> torch.Tensor:
    rows, columns = layer.codes.shape
    width = layer.scheme.width(columns)
    weight = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            g = int(layer.g_idx[k]) if layer.g_idx is not None else k // width
            weight[n, k] = (int(layer.codes[n, k]) - int(layer.zeros[n, g])) * float(layer.scales[n, g])
    return weight


@pytest.mark.parametrize(("in_features", "group_size"), SHAPES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_dequantize_is_the_formula(make_layer, bits, in_features, group_size, act_order) -> None:
    layer = make_layer(bits, group_size, 7, in_features, act_order=act_order)
    exact = weight_by_loops(layer)
    assert torch.equal(dequantize(layer, torch.float64), exact)
    assert torch.equal(dequantize(layer), exact.float())  # fp16 scale times a small integer is exact in fp32
    assert torch.equal(dequantize(layer, torch.float16), exact.half())


def test_dequantize_leaves_the_layer_alone(make_layer) -> None:
    layer = make_layer()
    codes, scales = layer.codes.clone(), layer.scales.clone()
    dequantize(layer, torch.float16)
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.scales, scales)


@pytest.mark.parametrize(("in_features", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_round_to_nearest_picks_the_nearest_code(bits, in_features, group_size) -> None:
    weight = torch.randn(6, in_features, generator=torch.Generator().manual_seed(bits))
    layer = round_to_nearest(weight, QuantScheme(bits, group_size))
    index = layer.group_index()
    candidates = torch.arange(layer.scheme.maxq + 1, dtype=torch.float64)
    zeros, scales = layer.zeros[:, index].double(), layer.scales[:, index].double()
    all_weights = (candidates[:, None, None] - zeros) * scales
    nearest = (all_weights - weight.double()).abs().min(dim=0).values
    found = (dequantize(layer, torch.float64) - weight.double()).abs()
    assert torch.allclose(found, nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quantize_recovers_codes_of_a_quantized_weight(make_layer, bits) -> None:
    layer = make_layer(bits, 32)
    assert torch.equal(quantize(dequantize(layer), layer.scales, layer.zeros, layer.scheme), layer.codes)


def test_quantize_takes_zero_scales() -> None:
    weight, scheme = torch.randn(2, 8), QuantScheme(2, -1)
    zeros = torch.tensor([[1], [3]], dtype=torch.int32)
    codes = quantize(weight, torch.zeros(2, 1), zeros, scheme)
    assert torch.equal(codes, zeros.to(torch.uint8).expand(2, 8))


@pytest.mark.parametrize("bits", [2, 3])
def test_minmax_holds_zeros_in_a_range_and_keeps_every_weight_in_reach(bits) -> None:
    scheme = QuantScheme(bits, 16)
    generator = torch.Generator().manual_seed(0)
    # shifted both ways, so that zeros lie at 0, at maxq and between
    weight = torch.randn(64, 64, generator=generator) + torch.linspace(-3, 3, 64)[:, None]
    free_scales, free_zeros = minmax_parameters(weight, scheme)
    scales, zeros = minmax_parameters(weight, scheme, zero_range=(1, 2))
    assert set(free_zeros.unique().tolist()) >= {0, 1, 2, scheme.maxq}
    assert set(zeros.unique().tolist()) == {1, 2}
    kept = free_zeros == zeros
    assert torch.equal(scales[kept], free_scales[kept])
    groups = weight.view(64, -1, 16).double()
    low, high = -zeros * scales.double(), (scheme.maxq - zeros) * scales.double()
    moved = ~kept
    assert bool((groups.amin(2) >= low - 1e-6)[moved].all()) and bool((groups.amax(2) <= high + 1e-6)[moved].all())
    tight = (groups.amin(2) - low).abs().minimum((groups.amax(2) - high).abs())
    assert bool((tight[moved] < 1e-5).all())  # the smallest such scale


@pytest.mark.parametrize("value", [0.0, 1e-12, -3.0])
def test_minmax_of_a_constant_weight_has_a_normal_scale(value) -> None:
    scales, zeros = minmax_parameters(torch.full((2, 8), value), QuantScheme(2, 4))
    assert bool((scales >= torch.finfo(torch.float16).tiny).all())
    assert bool(((zeros >= 0) & (zeros <= 3)).all())
