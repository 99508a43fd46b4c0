"""AWQ against bytes and weights of gptqmodel's own packers and dequantizer."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats import Exactness, QuantizedLinear, QuantScheme, dequantize, get_format
from formats.conformance import round_trip
from formats.errors import CheckpointError, UnsupportedSchemeError

GOLDEN = load_file(Path(__file__).parent / "golden" / "awq.safetensors")
STORED = ("qweight", "qzeros", "scales", "bias")
AWQ = get_format("awq")
SCHEME = QuantScheme(4, 32)


@pytest.fixture
def layer() -> QuantizedLinear:
    return QuantizedLinear(GOLDEN["codes"], GOLDEN["group_scales"], GOLDEN["zeros"], SCHEME, bias=GOLDEN["bias"])


def test_it_has_gptqmodels_bytes(layer) -> None:
    encoded = AWQ.encode(layer)
    assert set(encoded) == set(STORED)
    for name in STORED:
        assert torch.equal(encoded[name], GOLDEN[name]), name
        assert encoded[name].dtype == GOLDEN[name].dtype


def test_gptqmodels_bytes_are_read_as_gptqmodel_reads_them(layer) -> None:
    decoded = AWQ.decode({name: GOLDEN[name] for name in STORED}, SCHEME)
    assert torch.equal(decoded.codes, layer.codes)
    assert torch.equal(decoded.zeros, layer.zeros)
    assert torch.equal(dequantize(decoded, torch.float16).T, GOLDEN["dequantized"])


def test_a_word_holds_eight_outputs_in_awqs_order() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(-1, 32).contiguous()
    layer = QuantizedLinear(codes, torch.ones(8, 1).half(), torch.zeros(8, 1, dtype=torch.int32), SCHEME)
    word = int(AWQ.encode(layer)["qweight"][0, 0])
    assert [(word >> (4 * i)) & 15 for i in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("shape", [(64, 128, 32), (8, 48, 16), (24, 96, -1), (40, 256, 128)])
def test_every_size_against_gptqmodel_itself(make_layer, shape) -> None:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils", reason="needs the extra gptq")
    out_features, in_features, group_size = shape
    layer = make_layer(4, group_size, out_features, in_features)
    qweight, qzeros = packing.pack_awq(layer.codes.T.int(), layer.zeros.T.int(), 4)
    encoded = AWQ.encode(layer)
    assert torch.equal(encoded["qweight"], qweight)
    assert torch.equal(encoded["qzeros"], qzeros)
    width = layer.scheme.width(in_features)
    found = packing.dequantize_gemm(encoded["qweight"], encoded["qzeros"], encoded["scales"], 4, width)
    assert torch.equal(found.T, dequantize(layer, torch.float16))


def test_fp32_scales_are_rounded_within_the_bound(make_layer) -> None:
    found = round_trip(make_layer(4, 32, scale_dtype=torch.float32), AWQ)
    assert found.exactness is Exactness.ROUNDED
    assert found.ok
    assert 0 < found.max_abs_weight_error <= found.bound


def test_scales_beyond_fp16_are_refused(make_layer) -> None:
    layer = make_layer(4, 32, scale_dtype=torch.float32)
    with pytest.raises(UnsupportedSchemeError, match="a scale is 100000; awq stores fp16, at most 65504"):
        AWQ.encode(replace(layer, scales=torch.full_like(layer.scales, 1e5)))


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (QuantScheme(2, 32), (64, 128), "4 bits, not 2; use --to compressed-tensors or --to gptq_v2"),
        (QuantScheme(3, 32), (64, 128), "not 3"),
        (QuantScheme(8, 32), (64, 128), "not 8"),
        (QuantScheme(4, 32), (60, 128), "out_features is 60; awq at 4 bits takes multiples of 8"),
        (QuantScheme(4, 256), (64, 512), "group_size is 256 .* these do: 16, 32, 64, 128, -1"),
        (QuantScheme(4, 64), (64, 96), "group_size is 64 and in_features 96; .* these do: 16, 32, -1"),
        (QuantScheme(4, 32, desc_act=True), (64, 128), "no g_idx, which desc_act needs; use --to gptq"),
    ],
)
def test_what_cannot_be_held_is_named_with_what_can(scheme, shape, message) -> None:
    with pytest.raises(UnsupportedSchemeError, match=message):
        AWQ.check(scheme, *shape)


def test_config_is_autoawqs() -> None:
    config = AWQ.quantization_config(SCHEME, ["lm_head"])
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    skipping = AWQ.quantization_config(SCHEME, ["lm_head", "a.gate"])
    assert skipping["modules_to_not_convert"] == ["lm_head", "a.gate"]
    assert skipping["dynamic"] == {r"-:^a\.gate$": {}}
    assert AWQ.parse_config(json.loads(json.dumps(config))) == SCHEME
    assert AWQ.parse_config({"w_bit": 4, "q_group_size": 128, "version": "GEMM"}) == QuantScheme(4, 128)


def test_a_layer_of_its_own_scheme_is_refused() -> None:
    with pytest.raises(UnsupportedSchemeError, match=r"layer a\.b is w4g64 in a w4g32 model; .* --to gptq_v2"):
        AWQ.quantization_config(SCHEME, (), {"a.b": QuantScheme(4, 64)})
    assert AWQ.quantization_config(SCHEME, (), {"a.b": QuantScheme(4, 32, sym=True)})["bits"] == 4


@pytest.mark.parametrize("key", ["version", "format", "checkpoint_format"])
@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "llm-awq", "marlin"])
def test_other_layouts_are_refused_by_name(key, version) -> None:
    with pytest.raises(CheckpointError, match=f"awq version is '{version}'; only gemm is read"):
        AWQ.parse_config({"quant_method": "awq", "bits": 4, "group_size": 128, key: version})


@pytest.mark.parametrize("bits", [2, 8])
def test_other_bits_are_not_guessed_at(bits) -> None:
    with pytest.raises(CheckpointError, match=f"bits is {bits}; only 4-bit awq is read"):
        AWQ.decode({name: GOLDEN[name] for name in STORED}, QuantScheme(bits, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(64, 4)}, "qweight is float32; allowed are int32"),
        ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, r"qzeros has shape \[2, 3\]; .* takes \[2, 4\]"),
        ({"scales": torch.zeros(3, 32).half()}, r"scales has shape \[3, 32\]"),
        ({"scales": torch.full((2, 32), torch.inf).half()}, "NaN or infinity"),
        ({"qzeros": torch.zeros(4)}, r"qzeros has shape \[4\]; a layer has two-dimensional"),
    ],
)
def test_damaged_tensors_are_named(change, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        AWQ.decode({name: GOLDEN[name] for name in STORED} | change, SCHEME)


def test_detection_goes_by_the_method() -> None:
    assert AWQ.detect({"quant_method": "awq"}, ["a.qweight"])
    assert not AWQ.detect({"quant_method": "gptq"}, ["a.qweight"])
    assert not AWQ.detect({"quant_method": "awq"}, ["a.weight"])
    assert not AWQ.detect({}, ["a.qweight"])
