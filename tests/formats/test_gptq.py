"""GPTQ v1 and v2 against literal shift loops, and what they promise about scales and zeros."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from formats import Exactness, QuantizedLinear, dequantize, get_format
from formats.conformance import compare, round_trip
from formats.errors import CheckpointError, UnsupportedSchemeError
from formats.types import QuantScheme

V1, V2 = get_format("gptq"), get_format("gptq_v2")
BITS = [2, 3, 4, 8]
SHAPES = [(64, 128, 32), (64, 128, 64), (32, 128, 128), (96, 64, -1), (32, 96, 48)]  # out, in, group


def packed_by_shifts(values: np.ndarray, bits: int) -> np.ndarray:
    """A dense stream down each column, low bits first: value i starts at bit ``i * bits``; values ``[n, columns]``."""
    words = np.zeros((-(-values.shape[0] * bits // 32) + 1, values.shape[1]), dtype=np.uint64)
    for i, row in enumerate(values.astype(np.uint64)):
        word, shift = divmod(i * bits, 32)
        words[word] |= (row << np.uint64(shift)) & np.uint64(0xFFFFFFFF)
        words[word + 1] |= (row << np.uint64(shift)) >> np.uint64(32)
    return words[:-1].astype(np.uint32).view(np.int32)


def fields_of(qzeros: torch.Tensor, bits: int, count: int) -> list[list[int]]:
    """Stored fields by Python's integers, row by row."""
    rows = [sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row)) for row in qzeros.tolist()]
    return [[(number >> (bits * i)) & (2**bits - 1) for i in range(count)] for number in rows]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zeros", ["low", "high", "random", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_v2_bytes_are_the_shift_loops_and_come_back_exactly(make_layer, bits, zeros, shape) -> None:
    out_features, in_features, group_size = shape
    layer = make_layer(bits, group_size, out_features, in_features, zeros=zeros)
    tensors = V2.encode(layer)
    assert np.array_equal(tensors["qweight"].numpy(), packed_by_shifts(layer.codes.T.numpy(), bits))
    assert np.array_equal(tensors["qzeros"].numpy().T, packed_by_shifts(layer.zeros.numpy(), bits))
    assert torch.equal(tensors["scales"], layer.scales.T)
    found = round_trip(layer, V2)
    assert found.ok
    assert found.exactness is Exactness.EXACT


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zeros", ["low", "high", "random", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_v1_keeps_every_weight_and_wraps_no_field(make_layer, bits, zeros, shape) -> None:
    out_features, in_features, group_size = shape
    layer = make_layer(bits, group_size, out_features, in_features, zeros=zeros)
    tensors = V1.encode(layer)
    stored = torch.tensor(fields_of(tensors["qzeros"], bits, out_features)).T  # [out, groups]
    absent = layer.zeros == 0
    expected = torch.where(absent, 2**bits - 1, layer.zeros) - 1
    assert torch.equal(stored, expected.long())
    assert int(stored.max()) < 2**bits - 1
    assert torch.equal(tensors["scales"].T, torch.where(absent, -layer.scales, layer.scales))
    found = round_trip(layer, V1)
    assert found.ok
    assert found.max_abs_weight_error == 0
    assert found.exactness is (Exactness.EXACT_WEIGHTS if bool(absent.any()) else Exactness.EXACT)


@pytest.mark.parametrize("bits", BITS)
def test_v1_without_zero_at_0_is_v2_less_one(make_layer, bits) -> None:
    layer = make_layer(bits, 32)
    layer = replace(layer, zeros=layer.zeros.clamp(min=1))
    v1, v2 = V1.encode(layer), V2.encode(layer)
    assert torch.equal(v1["qweight"], v2["qweight"])
    assert torch.equal(v1["scales"], v2["scales"])
    less_one = torch.tensor(fields_of(v2["qzeros"], bits, 64)) - 1
    assert fields_of(v1["qzeros"], bits, 64) == less_one.tolist()


@pytest.mark.parametrize("fmt", [V1, V2])
@pytest.mark.parametrize("bits", BITS)
def test_act_order_and_bias_come_back(make_layer, fmt, bits) -> None:
    layer = make_layer(bits, 32, act_order=True, bias=True)
    decoded = fmt.decode(fmt.encode(layer), QuantScheme(bits, 32, desc_act=True))
    assert torch.equal(decoded.g_idx, layer.g_idx)
    assert torch.equal(decoded.bias, layer.bias)
    assert compare(layer, decoded, fmt).ok


@pytest.mark.parametrize("fmt", [V1, V2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_scales_beyond_fp16_precision_stay_within_the_bound(make_layer, fmt, dtype, bits) -> None:
    layer = make_layer(bits, 32, scale_dtype=dtype)
    if dtype is torch.bfloat16:
        layer = replace(layer, scales=layer.scales * 2.0**-12)  # below fp16's normal numbers
    decoded = fmt.decode(fmt.encode(layer), layer.scheme)
    found = compare(layer, decoded, fmt)
    assert found.exactness is Exactness.ROUNDED
    assert found.ok
    assert 0 < found.max_abs_weight_error <= found.bound
    exact_error = (dequantize(decoded, torch.float64) - dequantize(layer, torch.float64)).abs()
    assert bool((exact_error <= fmt.bound(layer).double()).all())
    steps = int((decoded.codes.int() - decoded.zeros[:, layer.group_index()]).abs().max())
    rounding = float((layer.scales.double() - layer.scales.half().double()).abs().max())
    assert found.bound <= steps * rounding * (1 + 1e-3) + 1e-6


def test_a_weight_beyond_the_bound_fails(make_layer) -> None:
    layer = make_layer(4, 32, scale_dtype=torch.float32)
    decoded = V2.decode(V2.encode(layer), layer.scheme)
    off = decoded.scales.clone()
    off[3, 1] *= 1.01
    found = compare(layer, replace(decoded, scales=off), V2)
    assert not found.ok
    assert found.worst[0] == 3
    assert found.worst[1] // 32 == 1


def test_fp32_scales_that_fp16_holds_are_exact(make_layer) -> None:
    layer = make_layer(4, 32)
    wide = replace(layer, scales=layer.scales.float())
    assert V2.exactness(wide) is Exactness.EXACT
    assert round_trip(wide, V2).ok


def test_signed_zeros_negative_and_subnormal_scales_are_kept(make_layer) -> None:
    layer = make_layer(2, 32)
    scales = layer.scales.clone()
    scales[:4, 0] = torch.tensor([0.0, -0.0, -0.25, 2.0**-24], dtype=torch.float16)
    layer = replace(layer, scales=scales)
    stored = V2.encode(layer)["scales"].T
    assert torch.equal(stored.view(torch.int16), scales.view(torch.int16))
    assert round_trip(layer, V1).ok
    assert round_trip(layer, V2).ok


@pytest.mark.parametrize("fmt", [V1, V2])
def test_scales_that_overflow_fp16_are_refused(make_layer, fmt) -> None:
    layer = make_layer(4, 32, scale_dtype=torch.float32)
    big = layer.scales.clone()
    big[0, 0] = 70000.0
    with pytest.raises(UnsupportedSchemeError, match=r"a scale is 70000; .* at most 65504"):
        fmt.encode(replace(layer, scales=big))


@pytest.mark.parametrize(("value", "dtype"), [(1.5, torch.float16), (1.0001, torch.float32), (1e6, torch.bfloat16)])
def test_bias_is_fp16_where_that_is_exact_and_untouched_where_not(make_layer, value, dtype) -> None:
    layer = replace(make_layer(4, 32), bias=torch.full((64,), value))
    stored = V2.encode(replace(layer, bias=layer.bias.to(dtype)))["bias"]
    assert stored.dtype is dtype
    assert torch.equal(stored, layer.bias.to(dtype))
    assert round_trip(layer, V1).ok


@pytest.mark.parametrize("fmt", [V1, V2])
@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (QuantScheme(5, 32), (64, 128), "2, 3, 4 and 8 bits, not 5"),
        (QuantScheme(1, 32), (64, 128), "not 1"),
        (QuantScheme(3, 16), (64, 112), "in_features is 112; .* multiples of 32"),
        (QuantScheme(3, 32), (40, 128), "out_features is 40; .* multiples of 32"),
        (QuantScheme(2, 8), (64, 24), "in_features is 24; .* multiples of 16"),
        (QuantScheme(4, 32), (60, 128), "out_features is 60; .* multiples of 8"),
        (QuantScheme(8, 32), (62, 128), "out_features is 62; .* multiples of 4"),
        (QuantScheme(4, 48), (64, 128), "group_size 48 does not divide in_features 128; these do: 128, 64, 32, 16, -1"),
        (QuantScheme(4, 128), (64, 64), "group_size 128 does not divide in_features 64; these do: 64, 32, 16, -1"),
    ],
)
def test_what_cannot_be_held_is_named_with_what_can(fmt, scheme, shape, message) -> None:
    with pytest.raises(UnsupportedSchemeError, match=message):
        fmt.check(scheme, *shape)


def test_encode_refuses_what_check_refuses(make_layer) -> None:
    with pytest.raises(UnsupportedSchemeError):
        V2.encode(make_layer(3, 10, 10, 70))


@pytest.mark.parametrize(("fmt", "quantizer"), [(V1, ["eqat", "gptqmodel"]), (V2, ["eqat"])])
def test_config_has_what_readers_look_for(fmt, quantizer) -> None:
    config = fmt.quantization_config(QuantScheme(2, 64))
    tools = [entry.split(":")[0] for entry in config.pop("meta")["quantizer"]]
    assert tools == quantizer
    assert config == {
        "quant_method": "gptq",
        "bits": 2,
        "group_size": 64,
        "sym": False,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": fmt.id,
        "format": fmt.id,
        "pack_dtype": "int32",
    }
    assert fmt.sidecar_files(QuantScheme(2, 64)) == {
        "quantize_config.json": fmt.quantization_config(QuantScheme(2, 64))
    }


def test_dynamic_carries_skipped_and_differing_modules() -> None:
    other = QuantScheme(8, -1)
    config = V2.quantization_config(
        QuantScheme(2, 64), ["lm_head", "model.layers.0.mlp.gate"], {"model.layers.1.mlp.up": other}
    )
    assert list(config["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.gate$", r"+:^model\.layers\.1\.mlp\.up$"]
    assert V2.layer_scheme(config, "model.layers.1.mlp.up", {}) == other
    assert V2.layer_scheme(config, "model.layers.1.mlp.up_proj", {}) == QuantScheme(2, 64)
    assert V2.layer_scheme(config, "model.layers.0.mlp.gate", {}) == QuantScheme(2, 64)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "gptq"}, "gptq"),
        ({"quant_method": "gptq", "format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2", "format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"bits": 4, "group_size": 128, "damp_percent": 0.01}, "gptq"),
        ({"method": "gptq", "checkpoint_format": "GPTQ_V2"}, "gptq_v2"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq", "format": "gptq_v2"}, None),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, None),
        ({"quant_method": "gptq", "format": "gptq_p"}, None),
        ({"quant_method": "awq"}, None),
        ({"quant_method": "eqat", "checkpoint_format": "native"}, None),
        ({}, None),
    ],
)
def test_detection_follows_the_label_and_defaults_to_v1(config, expected) -> None:
    names = ["model.layers.0.q.qweight", "model.layers.0.q.qzeros", "model.layers.0.q.scales"]
    assert [fmt.id for fmt in (V1, V2) if fmt.detect(config, names)] == ([expected] if expected else [])
    assert not any(fmt.detect(config, ["model.embed_tokens.weight"]) for fmt in (V1, V2))


def test_autogptq_configs_parse() -> None:
    config = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": True, "true_sequential": True}
    assert V1.parse_config(config) == QuantScheme(4, 128, sym=True, desc_act=True)
    assert V1.parse_config({"wbits": 3, "group_size": -1, "sym": False}) == QuantScheme(3, -1)


@pytest.mark.parametrize("config", [{"bits": 4}, {"bits": 4.0, "group_size": 128}, {"bits": 4, "group_size": 0}])
def test_bad_configs_are_refused(config) -> None:
    with pytest.raises(CheckpointError, match="quantization configuration"):
        V1.parse_config(config)


def test_other_containers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="pack_dtype is 'int16'"):
        V2.parse_config({"bits": 4, "group_size": 128, "pack_dtype": "int16"})


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", [V1, V2])
def test_packed_native_layers_encode_to_the_same_bytes(make_layer, bits, scale_dtype, fmt) -> None:
    layer = make_layer(bits, 32, bias=True, scale_dtype=scale_dtype)
    native = get_format("native")
    packed = native.decode_packed(native.encode(layer), layer.scheme)
    found, expected = fmt.encode_packed(packed), fmt.encode(layer)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_full_words_of_native_are_taken_over_as_they_are(make_layer, bits) -> None:
    layer = make_layer(bits, 32)
    native = get_format("native")
    tensors = native.encode(layer)
    assert V2.encode_packed(native.decode_packed(tensors, layer.scheme))["qweight"] is tensors["qweight"]


class TestReading:
    """Files of other producers, built field by field."""

    @staticmethod
    def tensors(bits: int, stored: list[list[int]], in_features: int = 32) -> dict[str, torch.Tensor]:
        fields = np.array(stored)  # [groups, out]
        groups, out_features = fields.shape
        codes = np.arange(in_features * out_features).reshape(in_features, out_features) % 2**bits
        return {
            "qweight": torch.from_numpy(packed_by_shifts(codes, bits)),
            "qzeros": torch.from_numpy(packed_by_shifts(fields.T, bits).T.copy()),
            "scales": torch.ones(groups, out_features, dtype=torch.float16),
        }

    @pytest.mark.parametrize("bits", BITS)
    def test_a_field_of_maxq_is_a_wrapped_zero(self, bits) -> None:
        maxq = 2**bits - 1
        stored = [[maxq, 0, maxq - 1, 0] * 8]
        layer = V1.decode(self.tensors(bits, stored), QuantScheme(bits, -1))
        assert layer.zeros.flatten().tolist() == [0, 1, maxq, 1] * 8

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_gptqmodels_borrow_is_undone_over_the_whole_word(self, bits) -> None:
        zeros = [0, 1, 0, 0, 2**bits - 1, 2, 0, 1] * 4
        ones = sum(1 << (bits * i) for i in range(32 // bits))
        per_word = 32 // bits
        stored = []
        for i in range(0, 32, per_word):
            word = sum(zero << (bits * j) for j, zero in enumerate(zeros[i : i + per_word]))
            borrowed = (word - ones) % 2**32
            stored += [(borrowed >> (bits * j)) & (2**bits - 1) for j in range(per_word)]
        fmt = V1.configured({"meta": {"quantizer": ["gptqmodel:2.0.0"]}})
        layer = fmt.decode(self.tensors(bits, [stored]), QuantScheme(bits, -1))
        assert layer.zeros.flatten().tolist() == zeros

    def test_our_own_and_other_producers_files_are_read_field_by_field(self) -> None:
        stored = [[3, 0, 3, 2] * 8]
        for quantizer in (["eqat:0.1.0", "gptqmodel:0.9.0"], ["auto_gptq:0.7.1"], "optimum:1.0", None):
            fmt = V1.configured({"meta": {"quantizer": quantizer}})
            layer = fmt.decode(self.tensors(2, stored), QuantScheme(2, -1))
            assert layer.zeros.flatten().tolist() == [0, 1, 0, 3] * 8

    def test_the_last_word_may_be_partial(self) -> None:
        fmt = V1.configured({"meta": {"quantizer": ["gptqmodel:2.0.0"]}})
        tensors = self.tensors(4, [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
        assert fmt.decode(tensors, QuantScheme(4, -1)).zeros.flatten().tolist() == list(range(1, 11))

    @pytest.mark.parametrize("bits", BITS)
    def test_in_features_follow_from_qweight_without_g_idx(self, bits) -> None:
        layer = V2.decode(self.tensors(bits, [[1] * 32] * 2, in_features=64), QuantScheme(bits, 32))
        assert layer.in_features == 64
        assert layer.g_idx is None

    def test_symmetric_files_are_recognised(self) -> None:
        assert V1.decode(self.tensors(4, [[7] * 32]), QuantScheme(4, -1, sym=True)).scheme.sym
        assert V2.decode(self.tensors(4, [[8] * 32]), QuantScheme(4, -1)).scheme.sym
        assert not V2.decode(self.tensors(4, [[7] * 32]), QuantScheme(4, -1, sym=True)).scheme.sym

    def test_a_consecutive_g_idx_is_no_act_order(self) -> None:
        tensors = self.tensors(4, [[7] * 32] * 2, in_features=64)
        tensors["g_idx"] = torch.arange(64) // 32
        layer = V1.decode(tensors, QuantScheme(4, 32, desc_act=True))
        assert layer.g_idx is None
        assert not layer.scheme.desc_act

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_other_scale_dtypes_are_kept(self, dtype) -> None:
        tensors = self.tensors(4, [[7] * 32])
        tensors["scales"] = tensors["scales"].to(dtype) / 3
        layer: QuantizedLinear = V1.decode(tensors, QuantScheme(4, -1))
        assert torch.equal(layer.scales, tensors["scales"].T)
