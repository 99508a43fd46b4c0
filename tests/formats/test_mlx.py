"""MLX against bytes of mx.quantize, weights of mx.dequantize, and Python's own rationals."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats import Exactness, QuantizedLinear, QuantScheme, dequantize, get_format
from formats.conformance import round_trip
from formats.errors import CheckpointError, InputError, UnsupportedSchemeError
from formats.mlx import MlxFormat

GOLDEN = load_file(Path(__file__).parent / "golden" / "mlx.safetensors")
MLX = get_format("mlx")
BITS = [2, 3, 4, 5, 6, 8]
DTYPES = ["float16", "bfloat16", "float32"]


def golden(bits: int, dtype: str) -> dict[str, torch.Tensor]:
    prefix = f"{bits}.{dtype}."
    return {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}


def value(number: float) -> Fraction:
    return Fraction(float(number))


class TestAgainstMlxsBytes:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_its_files_are_read_and_written_again_unchanged(self, bits, dtype) -> None:
        tensors = golden(bits, dtype)
        theirs = tensors.pop("dequantized")
        fmt = MlxFormat(dtype)
        layer = fmt.decode(tensors, QuantScheme(bits, 64))
        assert torch.equal(fmt.stored_weight(tensors, layer), theirs)
        again = fmt.encode(layer)
        mirrored = again["scales"] != tensors["scales"]  # groups whose bias comes out nearer as a complement
        assert torch.equal(again["scales"].abs(), tensors["scales"].abs())
        rows = ~mirrored.any(dim=1)
        assert bool(rows.any()) or bits > 4
        for name in ("weight", "scales"):
            assert torch.equal(again[name][rows].view(torch.uint8), tensors[name][rows].view(torch.uint8)), name

    @pytest.mark.parametrize("bits", BITS)
    def test_a_whole_zero_costs_no_more_than_the_two_roundings(self, bits) -> None:
        for dtype in DTYPES:
            tensors = golden(bits, dtype)
            layer = MLX.decode(tensors, QuantScheme(bits, 64))
            eps = torch.finfo(getattr(torch, dtype)).eps
            biases, scales = tensors["biases"].double(), tensors["scales"].double()
            limit = eps / 2 * (biases.abs() + layer.zeros * scales.abs()) * (1 + 2.0**-10)
            assert bool(((biases + scales * layer.zeros).abs() <= limit).all())

    def test_two_bits_lose_nothing(self) -> None:
        for dtype in ("float16", "bfloat16"):
            tensors = golden(2, dtype)
            layer = MLX.decode(tensors, QuantScheme(2, 64))
            assert torch.equal(dequantize(layer), tensors["dequantized"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_exact_biases_are_those_that_rationals_call_exact(bits, dtype) -> None:
    """Every significand of the dtype, normal and subnormal, with every zero-point."""
    stored = getattr(torch, dtype)
    limits = torch.finfo(stored)
    significands = 1 + torch.arange(round(1 / limits.eps), dtype=torch.float64) * limits.eps
    subnormal = torch.arange(1, 33, dtype=torch.float64) * limits.smallest_normal * limits.eps
    scales = torch.cat([significands * 2.0**-9, subnormal]).to(stored)
    rows, maxq = len(scales), 2**bits - 1
    zeros = torch.arange(maxq + 1, dtype=torch.int32).expand(rows, -1).contiguous()
    layer = QuantizedLinear(
        torch.zeros(rows, 32 * (maxq + 1), dtype=torch.uint8),
        scales[:, None].expand(-1, maxq + 1).contiguous(),
        zeros,
        QuantScheme(bits, 32),
    )
    tensors = MlxFormat(dtype).encode(layer)
    fits = 2 ** (11 if dtype == "float16" else 8)
    for row in range(0, rows, 7):
        for zero in range(maxq + 1):
            odd = value(scales[row]) / Fraction(2) ** -200  # an integer, whatever the scale
            exact = [_odd_part(int(odd) * z) < fits for z in (zero, maxq - zero)]
            bias, scale = value(tensors["biases"][row, zero]), value(tensors["scales"][row, zero])
            held = maxq - zero if scale < 0 else zero
            assert (bias == -scale * held) is any(exact), (float(scales[row]), zero)
            assert (scale < 0) is (exact[1] and not exact[0]) or not any(exact)


def _odd_part(number: int) -> int:
    return number // (number & -number) if number else 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32])
def test_what_readers_compute_stays_within_the_bound(make_layer, bits, dtype, source) -> None:
    layer = make_layer(bits, 32, scale_dtype=source, zeros="mixed")
    fmt = MlxFormat(dtype)
    tensors = fmt.encode(layer)
    found, exact = fmt.stored_weight(tensors, fmt.decode(tensors, layer.scheme)), dequantize(layer)
    if fmt.exactness(layer) is not Exactness.ROUNDED:
        assert torch.equal(found, exact)
    else:
        assert bool(((found - exact).abs() <= fmt.bound(layer)).all())
        steps = (tensors["scales"].float().abs() - layer.scales.float().abs()).abs().max() * 2**bits
        nearest = 2 * torch.finfo(fmt.scale_dtype).eps * layer.scales.float().max() * 2**bits
        assert fmt.bound(layer).max() <= steps + nearest


def test_a_bound_that_is_broken_is_noticed(make_layer) -> None:
    layer = make_layer(4, 32)
    tensors = MLX.encode(layer)
    tensors["biases"][3, 1] += tensors["scales"][3, 1] * 0.01
    weight = MLX.stored_weight(tensors, layer)
    assert bool(((weight - dequantize(layer)).abs() > MLX.bound(layer)).any())


@pytest.mark.parametrize("bits", [2, 3])
def test_two_and_three_bits_are_exact_in_sixteen(make_layer, bits) -> None:
    layer = make_layer(bits, 64, zeros="mixed")
    found = round_trip(layer, MLX)
    assert found.ok
    assert found.exactness is Exactness.EXACT_WEIGHTS
    kept = replace(layer, zeros=layer.zeros.clamp(max=2))
    assert round_trip(kept, MLX).exactness is Exactness.EXACT
    assert torch.equal(MLX.encode(kept)["scales"], kept.scales)


def test_a_scale_of_zero_keeps_the_weights(make_layer) -> None:
    layer = make_layer(2, 32)
    scales = layer.scales.clone()
    scales[:, 0] = 0
    found = round_trip(replace(layer, scales=scales), MLX)
    assert found.ok
    assert found.exactness is Exactness.EXACT_WEIGHTS


def test_symmetric_layers_are_recognised(make_layer) -> None:
    layer = make_layer(4, 32)
    zeros = torch.full_like(layer.zeros, 8)
    layer = replace(layer, zeros=zeros, scheme=QuantScheme(4, 32, sym=True))
    assert MLX.exactness(layer) is Exactness.EXACT
    assert MLX.decode(MLX.encode(layer), QuantScheme(4, 32)).scheme.sym


@pytest.mark.parametrize(("scale", "zero", "what"), [(70000.0, 0, "scale is 70000"), (40000.0, 2, "bias is 80000")])
def test_what_overflows_is_refused_with_the_way_out(make_layer, scale, zero, what) -> None:
    layer = make_layer(3, 32, scale_dtype=torch.float32)
    scales, zeros = layer.scales.clone(), layer.zeros.clone()
    scales[0, 0], zeros[0, 0] = scale, zero
    big = replace(layer, scales=scales, zeros=zeros)
    with pytest.raises(UnsupportedSchemeError, match=rf"a {what}; float16 ends at 65504; use --scale-dtype float32"):
        MLX.encode(big)
    assert round_trip(big, MlxFormat("float32")).ok


def test_the_linears_bias_is_narrowed_where_that_is_exact(make_layer) -> None:
    layer = make_layer(4, 32, bias=True)
    wide = replace(layer, bias=layer.bias.float())
    assert MLX.encode(wide)["bias"].dtype == torch.float16
    odd = replace(layer, bias=torch.full((64,), 1.0001))
    assert torch.equal(MLX.encode(odd)["bias"], odd.bias)


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (QuantScheme(7, 32), (64, 128), "2, 3, 4, 5, 6 and 8 bits, not 7"),
        (QuantScheme(1, 32), (64, 128), "not 1"),
        (QuantScheme(4, 16), (64, 128), r"group_size is 16 .*; these fit: 32, 64, 128; use --to gptq_v2"),
        (QuantScheme(4, -1), (64, 64), r"group_size is -1 .*; these fit: 32, 64"),
        (QuantScheme(4, 64), (64, 96), r"group_size is 64 and in_features 96; .*; these fit: 32;"),
        (QuantScheme(4, 32), (64, 40), "that divide in_features; use --to gptq_v2"),
        (QuantScheme(4, 32, desc_act=True), (64, 128), "desc_act .* use --to gptq"),
    ],
)
def test_what_cannot_be_held_is_named_with_what_can(scheme, shape, message) -> None:
    with pytest.raises(UnsupportedSchemeError, match=message):
        MLX.check(scheme, *shape)


def test_scale_dtypes_are_named() -> None:
    with pytest.raises(InputError, match="scale-dtype is 'int8'; allowed are float16, bfloat16, float32"):
        MlxFormat("int8")


class TestReading:
    @staticmethod
    def tensors(scale: float = 0.5, bias: float = -1.5, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.arange(16, dtype=torch.int32).view(4, 4).view(torch.uint32),
            "scales": torch.full((4, 1), scale, dtype=dtype),
            "biases": torch.full((4, 1), bias, dtype=dtype),
        }

    def test_a_free_bias_is_refused_with_its_size(self) -> None:
        with pytest.raises(CheckpointError, match=r"4 of 4 biases .* group 0: 3.0195 scales\).*--dequantize"):
            MLX.decode(self.tensors(bias=-1.51), QuantScheme(4, 32))

    @pytest.mark.parametrize(("bias", "zero"), [(-8.0, 16), (0.5, -1)])
    def test_zeros_out_of_range_are_refused(self, bias, zero) -> None:
        with pytest.raises(CheckpointError, match=rf"zero-points outside of 0..15 \(output 0, group 0: {zero}\)"):
            MLX.decode(self.tensors(bias=bias), QuantScheme(4, 32))

    def test_a_constant_group_has_no_zero(self) -> None:
        with pytest.raises(CheckpointError, match="no whole number of scales"):
            MLX.decode(self.tensors(scale=0.0, bias=1.0), QuantScheme(4, 32))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"weight": torch.zeros(4, 4, dtype=torch.int32)}, "weight is int32; allowed is uint32"),
            ({"scales": torch.zeros(4, 2).half()}, r"scales has shape \[4, 2\]; .* takes \[4, 1\]"),
            ({"biases": torch.zeros(4, 1).double()}, "biases is float64"),
            ({"biases": torch.full((4, 1), torch.nan)}, "biases hold NaN"),
            ({"biases": torch.zeros(4)}, r"biases has shape \[4\]"),
        ],
    )
    def test_damaged_tensors_are_named(self, change, message) -> None:
        with pytest.raises(CheckpointError, match=message):
            MLX.decode(self.tensors() | change, QuantScheme(4, 32))

    def test_missing_biases_are_named(self) -> None:
        tensors = self.tensors()
        del tensors["biases"]
        with pytest.raises(CheckpointError, match="biases is missing"):
            MLX.decode(tensors, QuantScheme(4, 32))


class TestConfiguration:
    def test_it_is_what_mlx_lm_writes(self) -> None:
        config = MLX.quantization_config(
            QuantScheme(2, 64), ["lm_head", "model.layers.0.mlp.gate"], {"model.layers.1.mlp.up": QuantScheme(4, 32)}
        )
        assert config == {
            "group_size": 64,
            "bits": 2,
            "mode": "affine",
            "lm_head": False,
            "model.layers.0.mlp.gate": False,
            "model.layers.1.mlp.up": {"group_size": 32, "bits": 4, "mode": "affine"},
        }
        assert MLX.config_keys == ("quantization", "quantization_config")
        assert MLX.layer_scheme(config, "model.layers.1.mlp.up", {}) == QuantScheme(4, 32)
        assert MLX.layer_scheme(config, "model.layers.1.mlp.down", {}) == QuantScheme(2, 64)
        with pytest.raises(CheckpointError, match="says False, not quantized, but it has scales"):
            MLX.layer_scheme(config, "lm_head", {})

    def test_a_partial_object_and_true_mean_the_model_wide_fields(self) -> None:
        config = {"group_size": 64, "bits": 4, "a": {"bits": 8}, "b": True}
        assert MLX.layer_scheme(config, "a", {}) == QuantScheme(8, 64)
        assert MLX.layer_scheme(config, "b", {}) == QuantScheme(4, 64)
        with pytest.raises(CheckpointError, match="says 3; expected an object"):
            MLX.layer_scheme(config | {"c": 3}, "c", {})

    @pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
    def test_other_modes_are_refused_by_name(self, mode) -> None:
        with pytest.raises(CheckpointError, match=f"mode is '{mode}'; only affine"):
            MLX.parse_config({"group_size": 32, "bits": 4, "mode": mode})

    def test_detection_needs_scales_and_no_quant_method(self) -> None:
        names = ["model.layers.0.q.weight", "model.layers.0.q.scales", "model.layers.0.q.biases"]
        assert MLX.detect({"group_size": 64, "bits": 4}, names)
        assert not MLX.detect({"group_size": 64, "bits": 4, "quant_method": "awq"}, names)
        assert not MLX.detect({"group_size": 64, "bits": 4}, names[:1])
        assert not MLX.detect({}, names)

    def test_rope_fields_go_where_mlx_lm_looks(self) -> None:
        config = {"model_type": "qwen2", "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
        assert MLX.adapted_config(config) == config | {"rope_theta": 1e4}
        scaled = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
        assert MLX.adapted_config(scaled)["rope_scaling"] == {"rope_type": "llama3", "type": "llama3", "factor": 8.0}
        assert MLX.adapted_config({"rope_theta": 7.0, **config})["rope_theta"] == 7.0
        nested = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}
        assert MLX.adapted_config(nested) == nested
