"""BitBLAS against bytes by bitblas' own functions and against words built from Python's integers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats import Exactness, QuantizedLinear, dequantize, get_format
from formats.conformance import compare, round_trip
from formats.errors import CheckpointError, UnsupportedSchemeError
from formats.types import QuantScheme

GOLDEN = Path(__file__).parent / "golden" / "bitblas"
BITBLAS = get_format("bitblas")
SHAPES = [(64, 128, 32), (48, 128, 128), (16, 192, 64), (96, 80, -1)]  # out, in, group
# First bit of code 0, 1, 2, ... in a word.
POSITIONS = {
    2: [0, 8, 2, 10, 4, 12, 6, 14, 16, 24, 18, 26, 20, 28, 22, 30],
    4: [0, 16, 4, 20, 8, 24, 12, 28],
    8: [0, 8, 16, 24],
}


def golden(bits: int) -> tuple[dict[str, torch.Tensor], QuantizedLinear]:
    tensors = load_file(GOLDEN / f"w{bits}g64.safetensors")
    codes, zeros = tensors["codes"].view(torch.uint8), tensors["zeros"].int()
    return tensors, QuantizedLinear(codes, tensors["scales"], zeros, QuantScheme(bits, 64))


def bytes_of(rows: list[list[int]], positions: list[int]) -> list[list[int]]:
    """Signed bytes of little-endian words, ``len(positions)`` values in each."""
    step = len(positions)
    packed = []
    for row in rows:
        runs = (row[i : i + step] for i in range(0, len(row), step))
        words = [sum(value << at for value, at in zip(run, positions, strict=True)) for run in runs]
        packed.append([byte - 256 if byte > 127 else byte for word in words for byte in word.to_bytes(4, "little")])
    return packed


@pytest.mark.parametrize("bits", [2, 4])
class TestAgainstBitblas:
    def test_codes_and_zeros_have_its_bytes(self, bits) -> None:
        theirs, layer = golden(bits)
        ours = BITBLAS.encode(layer)
        assert set(ours) == {"qweight", "qzeros", "scales"}
        assert torch.equal(ours["qweight"], theirs["interleaved"])
        assert torch.equal(ours["qweight"], theirs["transform_weight"])
        assert torch.equal(ours["qzeros"], theirs["zeros_quantized"])
        assert torch.equal(ours["scales"], theirs["scales"])

    def test_before_the_interleave_they_are_gptq_v2s(self, bits) -> None:
        theirs, layer = golden(bits)
        v2 = get_format("gptq_v2").encode(layer)
        assert torch.equal(v2["qweight"].T.contiguous().view(torch.int8), theirs["compressed"])
        assert torch.equal(v2["qzeros"].view(torch.int8), theirs["zeros_quantized"])

    @pytest.mark.parametrize("name", ["qzeros", "zeros"])
    @pytest.mark.parametrize("mode", ["quantized", "original"])
    def test_its_tensors_are_read_by_either_name_and_in_both_modes(self, bits, name, mode) -> None:
        theirs, layer = golden(bits)
        tensors = {"qweight": theirs["interleaved"], "scales": theirs["scales"], name: theirs[f"zeros_{mode}"]}
        found = BITBLAS.decode(tensors, layer.scheme)
        assert torch.equal(found.codes, layer.codes)
        assert torch.equal(found.zeros, layer.zeros)
        assert compare(layer, found, BITBLAS).ok

    def test_zeros_times_scales_are_not_taken_for_zeros(self, bits) -> None:
        theirs, layer = golden(bits)
        tensors = {"qweight": theirs["interleaved"], "scales": theirs["scales"], "zeros": theirs["zeros_rescale"]}
        with pytest.raises(CheckpointError, match=r"zeros holds .*; expected integers 0\.\..*mode rescale"):
            BITBLAS.decode(tensors, layer.scheme)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", ["low", "high", "random", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_the_words_of_pythons_integers_and_come_back_exactly(make_layer, bits, zeros, shape) -> None:
    out_features, in_features, group_size = shape
    layer = make_layer(bits, group_size, out_features, in_features, zeros=zeros, bias=True)
    tensors = BITBLAS.encode(layer)
    per_byte = 8 // bits
    packed = [
        [sum(row[i + j] << bits * j for j in range(per_byte)) for i in range(0, out_features, per_byte)]
        for row in layer.zeros.T.tolist()
    ]
    assert tensors["qweight"].tolist() == bytes_of(layer.codes.tolist(), POSITIONS[bits])
    assert tensors["qzeros"].view(torch.uint8).tolist() == packed
    assert torch.equal(tensors["scales"], layer.scales)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    found = round_trip(layer, BITBLAS)
    assert found.ok
    assert found.exactness is Exactness.EXACT


@pytest.mark.parametrize(("bits", "container"), [(3, 4), (2, 4), (1, 4)])
def test_a_wider_container_keeps_every_number(make_layer, bits, container) -> None:
    layer = make_layer(bits, 32, zeros="mixed", bias=True)
    fmt = get_format("bitblas", container_bits=str(container))
    stored = fmt.encode(layer)
    found = BITBLAS.decode(stored, QuantScheme(container, 32))  # what a reader of the file sees
    assert stored["qweight"].tolist() == bytes_of(layer.codes.tolist(), POSITIONS[container])
    assert torch.equal(found.codes, layer.codes)
    assert torch.equal(found.zeros, layer.zeros)
    assert torch.equal(dequantize(found), dequantize(layer))
    assert fmt.exactness(layer) is Exactness.EXACT_WEIGHTS
    assert round_trip(layer, fmt).ok
    assert fmt.quantization_config(layer.scheme)["bits"] == container


def test_a_container_of_the_codes_own_bits_is_exact(make_layer) -> None:
    layer, fmt = make_layer(4, 32), get_format("bitblas", container_bits="4")
    assert fmt.exactness(layer) is Exactness.EXACT
    assert torch.equal(fmt.encode(layer)["qweight"], BITBLAS.encode(layer)["qweight"])


def test_zeros_are_named_as_asked(make_layer) -> None:
    layer = make_layer(4, 32)
    older = get_format("bitblas", zeros_name="zeros").encode(layer)
    assert set(older) == {"qweight", "zeros", "scales"}
    assert torch.equal(older["zeros"], BITBLAS.encode(layer)["qzeros"])
    assert torch.equal(BITBLAS.decode(older, layer.scheme).zeros, layer.zeros)


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_symmetric_layer_without_zeros_has_them_in_the_middle(make_layer, bits, empty) -> None:
    tensors = BITBLAS.encode(make_layer(bits, 32))
    del tensors["qzeros"]
    if empty:
        tensors["qzeros"] = torch.empty(0, dtype=torch.int8)
    found = BITBLAS.decode(tensors, QuantScheme(bits, 32, sym=True))
    assert found.scheme.sym
    assert bool((found.zeros == 2 ** (bits - 1)).all())


def test_scales_beyond_fp16_precision_stay_within_the_bound(make_layer) -> None:
    layer = make_layer(2, 32, scale_dtype=torch.float32)
    found = round_trip(layer, BITBLAS)
    assert found.exactness is Exactness.ROUNDED
    assert 0 < found.max_abs_weight_error <= found.bound
    assert found.ok
    big = replace(layer, scales=layer.scales * 1e7)
    with pytest.raises(UnsupportedSchemeError, match=r"at most 65504"):
        BITBLAS.encode(big)


@pytest.mark.parametrize(
    ("scheme", "shape", "options", "said"),
    [
        (QuantScheme(3, 64), (64, 128), {}, "not 3; --container-bits 4"),
        (QuantScheme(5, 64), (64, 128), {}, "not 5; take one of those, or use --to native"),
        (QuantScheme(8, 64), (64, 128), {"container_bits": "4"}, "8 bits do not fit --container-bits 4"),
        (QuantScheme(4, 64, desc_act=True), (64, 128), {}, r"no act-order .* --to gptq"),
        (QuantScheme(4, 64), (72, 128), {}, "out_features is 72; bitblas at 4 bits takes multiples of 16"),
        (QuantScheme(4, -1), (64, 72), {}, "in_features is 72; bitblas at 4 bits takes multiples of 16"),
        (QuantScheme(4, 256), (64, 256), {}, "group_size is 256, in_features 256; bitblas takes 128, 64, 32, -1 here"),
        (QuantScheme(4, 64), (64, 96), {}, "group_size is 64, in_features 96; bitblas takes 32, -1 here"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_way_out(scheme, shape, options, said) -> None:
    with pytest.raises(UnsupportedSchemeError, match=said):
        get_format("bitblas", **options).check(scheme, *shape)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("qweight", torch.zeros(64, 64), "qweight is float32; allowed are int8"),
        ("qweight", torch.zeros(4, 8, 16, 8, dtype=torch.int8), "expected two axes .*propagate_b"),
        ("qzeros", torch.zeros(4, 8, dtype=torch.int8), r"qzeros has shape \[4, 8\]; expected \[4, 32\]"),
        ("scales", torch.zeros(4, 64), r"scales has shape \[4, 64\]; expected \[64, 4\]"),
        ("zeros", torch.zeros(4, 32, dtype=torch.int8), "takes either qzeros or zeros"),
        ("qzeros", None, "no zeros in a 4-bit layer"),
        ("scales", None, "no scales"),
    ],
)
def test_tensors_that_contradict_the_layout_are_refused(make_layer, name, value, said) -> None:
    tensors = BITBLAS.encode(make_layer(4, 32, zeros="random"))
    tensors = {key: tensor for key, tensor in {**tensors, name: value}.items() if tensor is not None}
    if name == "zeros":
        tensors["qzeros"] = tensors["qzeros"] | 1
    with pytest.raises(CheckpointError, match=said):
        BITBLAS.decode(tensors, QuantScheme(4, 32))


def test_the_configuration_is_gptqs_and_comes_back() -> None:
    scheme = QuantScheme(2, 64)
    config = BITBLAS.quantization_config(scheme, ["lm_head", "model.layers.0.mlp.gate"])
    assert (config["quant_method"], config["checkpoint_format"], config["format"]) == ("gptq", "bitblas", "bitblas")
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (2, 64, False, False)
    assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.gate$": {}}
    assert BITBLAS.parse_config(config) == scheme
    assert BITBLAS.sidecar_files(scheme) == {"quantize_config.json": BITBLAS.quantization_config(scheme)}
    assert BITBLAS.detect(config, ["model.layers.0.mlp.up.qweight"])
    assert not BITBLAS.detect({**config, "checkpoint_format": "gptq_v2"}, ["model.layers.0.mlp.up.qweight"])
    assert not get_format("gptq_v2").detect(config, ["model.layers.0.mlp.up.qweight"])


def test_layers_of_other_bits_are_refused_unless_stored_alike() -> None:
    scheme, others = QuantScheme(4, 64), {"model.layers.1.mlp.up": QuantScheme(3, 64)}
    with pytest.raises(UnsupportedSchemeError, match=r"layer model\.layers\.1\.mlp\.up is w3g64, the model w4g64"):
        BITBLAS.quantization_config(scheme, overrides=others)
    config = get_format("bitblas", container_bits="4").quantization_config(scheme, overrides=others)
    assert (config["bits"], config.get("dynamic")) == (4, None)
    symmetric = {"model.layers.1.mlp.up": replace(scheme, sym=True)}
    assert "dynamic" not in BITBLAS.quantization_config(scheme, overrides=symmetric)


def test_act_order_without_an_order_is_not_read() -> None:
    config = {**BITBLAS.quantization_config(QuantScheme(4, 64)), "desc_act": True}
    with pytest.raises(CheckpointError, match="desc_act is true"):
        BITBLAS.parse_config(config)
    assert BITBLAS.parse_config({**config, "group_size": -1}) == QuantScheme(4, -1)


def test_gptqmodels_config_class_takes_ours() -> None:
    quantization = pytest.importorskip("gptqmodel.quantization", reason="needs gptqmodel: pip install 'eqat[gptq]'")
    config = BITBLAS.quantization_config(QuantScheme(2, 64), ["lm_head", "model.layers.0.mlp.gate"])
    found = quantization.QuantizeConfig.from_quant_config(config)
    assert (found.bits, found.group_size, found.sym, found.desc_act) == (2, 64, False, False)
    assert found.format == quantization.FORMAT.BITBLAS
    assert found.dynamic_get("model.layers.0.mlp.gate") is False
    assert found.dynamic_get("model.layers.0.mlp.gate_proj", "bits", 2) == 2
