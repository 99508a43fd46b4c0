"""QuantLinear against F.linear on the canonical layer's dequantized weight."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from eqat_train.e2e_qp.quant_linear import QuantLinear
from formats import QuantizedLinear, QuantScheme, dequantize
from formats.errors import InvalidLayerError

OUT, IN = 40, 192


def make_layer(bits: int = 2, group_size: int = 64, *, bias: bool = False, act_order: bool = False) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits)
    scheme = QuantScheme(bits, group_size, desc_act=act_order)
    groups = scheme.groups(IN)
    order = torch.randperm(IN, generator=generator)
    return QuantizedLinear(
        torch.randint(0, 2**bits, (OUT, IN), generator=generator, dtype=torch.uint8),
        (torch.rand(OUT, groups, generator=generator) * 0.02 + 0.01).half(),
        torch.randint(0, 2**bits, (OUT, groups), generator=generator, dtype=torch.int32),
        scheme,
        bias=torch.randn(OUT, generator=generator).half() if bias else None,
        g_idx=(order // scheme.width(IN)).int() if act_order else None,
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "act_order"), [(32, False), (128, False), (-1, False), (64, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_the_dequantized_linear_bit_for_bit(
    bits: int, group_size: int, act_order: bool, bias: bool
) -> None:
    layer = make_layer(bits, group_size, bias=bias, act_order=act_order)
    x = torch.randn(2, 7, IN)
    expected = F.linear(x, dequantize(layer), None if layer.bias is None else layer.bias.float())
    assert torch.equal(QuantLinear.from_layer(layer)(x), expected)


def test_the_scales_are_the_only_parameter_and_the_weight_stays_packed() -> None:
    module = QuantLinear.from_layer(make_layer(2, 64, bias=True))
    assert [name for name, _ in module.named_parameters()] == ["scales"]
    assert module.scales.dtype == torch.float32 and module.scales.shape == (IN // 64, OUT)
    assert {name for name, _ in module.named_buffers()} == {"qweight", "qzeros", "bias"}
    assert module.qweight.dtype == torch.int32 and module.qweight.numel() * 16 == OUT * IN


def test_forward_uses_the_scales_that_will_be_stored() -> None:
    layer = make_layer()
    module = QuantLinear.from_layer(layer)
    x = torch.randn(5, IN)
    with torch.no_grad():
        module.scales.mul_(1 + 1e-5)  # less than half a step of float16
    assert torch.equal(module(x), F.linear(x, dequantize(layer)))
    with torch.no_grad():
        module.scales.mul_(1.01)
    stored = replace(layer, scales=module.stored_scales().t().contiguous())
    assert not torch.equal(stored.scales, layer.scales)
    assert torch.equal(module(x), F.linear(x, dequantize(stored)))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_straight_through(scale_dtype: torch.dtype) -> None:
    layer = make_layer(3, 64)
    module = QuantLinear.from_layer(layer, scale_dtype=scale_dtype).double()
    with torch.no_grad():
        module.scales.mul_(1.003)
    x = torch.randn(5, IN, dtype=torch.float64)
    module(x).square().sum().backward()
    rounded = module.stored_scales().double().requires_grad_()
    centered = (layer.codes.int() - layer.zeros.repeat_interleave(64, dim=1)).double()
    (x @ (centered * rounded.t().repeat_interleave(64, dim=1)).t()).square().sum().backward()
    assert module.scales.grad is not None and rounded.grad is not None
    torch.testing.assert_close(module.scales.grad, rounded.grad, rtol=1e-11, atol=1e-11)


def test_autocast_computes_in_its_dtype_and_keeps_the_gradient_float32() -> None:
    module = QuantLinear.from_layer(make_layer(bias=True))
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, module(x.to(torch.bfloat16)))
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert module.scales.grad is not None and module.scales.grad.dtype == torch.float32


def test_a_scale_dtype_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(InvalidLayerError, match="allowed are float16, bfloat16, float32"):
        QuantLinear.from_layer(make_layer(), scale_dtype=torch.float64)


def test_the_layer_it_was_made_of_does_not_change_with_it() -> None:
    layer = make_layer()
    before = layer.scales.clone()
    module = QuantLinear.from_layer(replace(layer, scales=layer.scales.float()), scale_dtype=torch.float32)
    with torch.no_grad():
        module.scales.zero_()
    assert torch.equal(layer.scales, before)
