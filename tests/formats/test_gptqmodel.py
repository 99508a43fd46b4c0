"""GPTQ against gptqmodel's own packer, converter and dequantizer, on the CPU."""

import os
from dataclasses import replace

import pytest
import torch

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
pytest.importorskip("gptqmodel", reason="needs gptqmodel: pip install 'eqat[gptq]'")

from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT, QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

from formats import QuantizedLinear, dequantize, get_format
from formats.types import QuantScheme

BITS = [2, 3, 4, 8]
SHAPES = [(64, 128, 32), (32, 128, 128), (96, 64, -1)]  # out, in, group
ZEROS = ["low", "high", "random", "mixed"]
V1, V2 = get_format("gptq"), get_format("gptq_v2")


def module_for(layer: QuantizedLinear) -> TorchLinear:
    module = TorchLinear(
        bits=layer.scheme.bits,
        group_size=layer.scheme.group_size,
        sym=False,
        desc_act=layer.scheme.desc_act,
        in_features=layer.in_features,
        out_features=layer.out_features,
        bias=layer.bias is not None,
        pack_dtype=torch.int32,
        register_buffers=True,
        format=FORMAT.GPTQ,
    )
    return module.eval()


def packed_by_gptqmodel(layer: QuantizedLinear) -> TorchLinear:
    module = module_for(layer)
    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight.data = dequantize(layer)
    if layer.bias is not None:
        linear.bias.data = layer.bias.float()
    module.pack_original(linear, layer.scales.float(), layer.zeros.float(), layer.group_index().int())
    return module


def loaded_by_gptqmodel(tensors: dict[str, torch.Tensor], layer: QuantizedLinear, *, v1: bool) -> torch.Tensor:
    module = module_for(layer)
    module.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    if v1:
        convert_gptq_v1_to_v2_format_module(module, bits=layer.scheme.bits, pack_dtype=torch.int32)
    return module.dequantize_weight().T


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("shape", SHAPES)
class TestAgainstGptqmodel:
    @pytest.fixture
    def layer(self, make_layer, bits, zeros, shape) -> QuantizedLinear:
        out_features, in_features, group_size = shape
        return make_layer(bits, group_size, out_features, in_features, zeros=zeros, bias=True)

    def test_v2_has_its_bytes(self, layer) -> None:
        theirs, ours = packed_by_gptqmodel(layer), V2.encode(layer)
        assert set(ours) == set(theirs.state_dict())
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours[name], tensor), name

    def test_v2_is_read_as_the_formula(self, layer) -> None:
        found = loaded_by_gptqmodel(V2.encode(layer), layer, v1=False)
        assert torch.equal(found, dequantize(layer, torch.float16))

    def test_v1_is_read_as_the_formula(self, layer) -> None:
        found = loaded_by_gptqmodel(V1.encode(layer), layer, v1=True)
        assert torch.equal(found, dequantize(layer, torch.float16))

    def test_v1_has_its_bytes_where_no_zero_is_0(self, layer) -> None:
        layer = replace(layer, zeros=layer.zeros.clamp(min=1))
        theirs, ours = packed_by_gptqmodel(layer), V1.encode(layer)
        convert_gptq_v2_to_v1_format_module(theirs, QuantizeConfig(bits=layer.scheme.bits))
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours[name], tensor), name

    def test_its_own_v1_files_are_read_wrapped_zeros_included(self, layer) -> None:
        theirs = packed_by_gptqmodel(layer)
        convert_gptq_v2_to_v1_format_module(theirs, QuantizeConfig(bits=layer.scheme.bits))
        fmt = V1.configured({"meta": {"quantizer": ["gptqmodel:7.6.0"]}})
        decoded = fmt.decode(theirs.state_dict(), layer.scheme)
        assert torch.equal(decoded.zeros, layer.zeros)
        assert torch.equal(dequantize(decoded), dequantize(layer))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fmt", [V1, V2])
def test_act_order_is_read_as_the_formula(make_layer, bits, fmt) -> None:
    layer = make_layer(bits, 32, act_order=True)
    found = loaded_by_gptqmodel(fmt.encode(layer), layer, v1=fmt is V1)
    assert torch.equal(found, dequantize(layer, torch.float16))


def test_a_bias_outside_fp16_is_cast_by_the_reader(make_layer) -> None:
    layer = replace(make_layer(4, 32), bias=torch.full((64,), 1.0001))
    module = module_for(layer)
    module.load_state_dict(V2.encode(layer))
    assert torch.equal(module.bias, layer.bias.half())


@pytest.mark.parametrize("fmt", [V1, V2])
def test_its_config_class_takes_ours(fmt) -> None:
    config = fmt.quantization_config(
        QuantScheme(2, 64), ["lm_head", "model.layers.0.mlp.gate"], {"model.layers.1.mlp.up": QuantScheme(8, -1)}
    )
    found = QuantizeConfig.from_quant_config(config)
    assert (found.bits, found.group_size, found.sym, found.desc_act, found.lm_head) == (2, 64, False, False, False)
    assert found.format == fmt.id
    assert found.pack_dtype is torch.int32
    assert found.is_quantized_by_gptaq() is (fmt is V1)  # what its loader asks of asymmetric v1
    assert found.dynamic_get("model.layers.0.mlp.gate") is False
    assert found.dynamic_get("model.layers.0.mlp.gate_proj", "bits", 2) == 2
    assert found.dynamic_get("model.layers.1.mlp.up", "bits", 2) == 8
    assert found.dynamic_get("model.layers.1.mlp.up", "group_size", 64) == -1
