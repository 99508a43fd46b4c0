"""auto-round against files that auto-round wrote, and against its own bit packer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats import Exactness, QuantizedLinear, QuantScheme, dequantize, get_format
from formats.conformance import round_trip
from formats.errors import CheckpointError, UnsupportedSchemeError
from formats.model import open_checkpoint

FOLDER = Path(__file__).parent / "golden"
GOLDEN = load_file(FOLDER / "auto_round.safetensors")
CONFIGS = json.loads((FOLDER / "auto_round.json").read_text())
FORMAT = get_format("auto-round")
Q = "model.layers.0.self_attn.q_proj"


def golden(case: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{case}."): tensor for name, tensor in GOLDEN.items() if name.startswith(f"{case}.")}


@pytest.mark.parametrize("case", CONFIGS)
def test_its_files_are_read_as_it_reads_them(case) -> None:
    config, tensors = CONFIGS[case], golden(case)
    theirs = tensors.pop("dequantized")
    assert FORMAT.detect(config, [f"{Q}.qweight"])
    fmt = FORMAT.configured(config)
    layer = fmt.decode(tensors, fmt.parse_config(config))
    assert torch.equal(dequantize(layer, torch.float16), theirs)
    assert layer.scheme.sym is config["sym"]
    assert fmt.features({name: tuple(tensor.shape) for name, tensor in tensors.items()}, layer.scheme) == (32, 64)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_it_has_auto_rounds_bytes(bits, kind) -> None:
    tensors = golden(f"w{bits}-{kind}-auto_round_gptqmodel")
    del tensors["dequantized"], tensors["g_idx"]
    encoded = FORMAT.encode(FORMAT.decode(tensors, QuantScheme(bits, 32)))
    assert set(encoded) == set(tensors)
    assert all(torch.equal(encoded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_width_against_its_packer(make_layer, bits) -> None:
    packing = pytest.importorskip("auto_round.utils.bit_packing", reason="needs the extra auto-round")
    layer = make_layer(bits, 32, 64, 128)
    encoded = FORMAT.encode(layer)
    assert torch.equal(encoded["qweight"], packing.pack_bitstream(layer.codes.int(), bits, dim=1).T)
    assert torch.equal(encoded["qzeros"], packing.pack_bitstream(layer.zeros.T, bits, dim=1))
    assert "g_idx" not in encoded


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_that_its_old_packer_borrowed_for_are_restored(make_layer, bits) -> None:
    layer = make_layer(bits, 32, 32, 64, zeros="mixed")
    assert bool((layer.zeros == 0).any())
    per_word = 32 // bits
    stored = []  # what summing (z - 1) << shift over a word leaves, in Python's integers
    for group in layer.zeros.T.tolist():
        words = (group[i : i + per_word] for i in range(0, 32, per_word))
        sums = (sum((zero - 1) << (bits * i) for i, zero in enumerate(word)) % 2**32 for word in words)
        stored.append([word - 2**32 if word >= 2**31 else word for word in sums])
    tensors = FORMAT.encode(layer) | {"qzeros": torch.tensor(stored, dtype=torch.int32)}
    fmt = FORMAT.configured({"packing_format": "auto_round:auto_gptq"})
    assert torch.equal(fmt.decode(tensors, layer.scheme).zeros, layer.zeros)


def test_its_present_packer_moves_a_zero_of_0_to_1(make_layer) -> None:
    module = pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp", reason="needs the extra auto-round")
    layer = make_layer(4, 32, 32, 64, zeros="mixed")
    theirs = module.QuantLinear(4, 32, 64, 32, False)
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = dequantize(layer)
    theirs.pack(linear, layer.scales.float(), layer.zeros, device="cpu")
    fmt = FORMAT.configured({"packing_format": "auto_round:auto_gptq"})
    found = fmt.decode(dict(theirs.state_dict()), layer.scheme)
    assert torch.equal(found.zeros, layer.zeros.clamp(min=1))
    assert torch.equal(found.codes, layer.codes)


def test_fp32_scales_are_rounded_within_the_bound(make_layer) -> None:
    found = round_trip(make_layer(3, 32, scale_dtype=torch.float32), FORMAT)
    assert found.exactness is Exactness.ROUNDED
    assert found.ok
    assert 0 < found.max_abs_weight_error <= found.bound


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (QuantScheme(1, 32), (64, 128), "2 to 8 bits, not 1"),
        (QuantScheme(4, 16), (64, 112), "in_features is 112; auto-round at 4 bits takes multiples of 32"),
        (QuantScheme(4, 32), (48, 128), "out_features is 48"),
        (QuantScheme(4, 64), (64, 96), "group_size 64 does not divide in_features 96"),
        (QuantScheme(4, 32, desc_act=True), (64, 128), "no g_idx, which desc_act needs; use --to gptq"),
    ],
)
def test_what_cannot_be_held_is_named_with_what_can(scheme, shape, message) -> None:
    with pytest.raises(UnsupportedSchemeError, match=message):
        FORMAT.check(scheme, *shape)


def test_config_names_what_differs() -> None:
    other = QuantScheme(8, -1)
    config = FORMAT.quantization_config(QuantScheme(2, 64), ["lm_head", "model.layers.0.mlp.gate"], {"a.up": other})
    assert config == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:gptqmodel",
        "bits": 2,
        "group_size": 64,
        "sym": False,
        "data_type": "int",
        "extra_config": {
            "lm_head": {"bits": 16, "data_type": "float"},
            "model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"},
            "a.up": {"bits": 8, "group_size": -1, "sym": False, "data_type": "int"},
        },
    }
    assert FORMAT.layer_scheme(config, "a.up", {}) == other
    assert FORMAT.layer_scheme(config, "a.up_proj", {}) == QuantScheme(2, 64)
    assert FORMAT.quantization_config(QuantScheme(4, 32), ())["extra_config"]["lm_head"]["bits"] == 4


def test_extra_config_may_hold_patterns() -> None:
    config = {"bits": 4, "group_size": 128, "sym": True, "extra_config": {".*down_proj.*": {"bits": 8, "sym": False}}}
    assert FORMAT.layer_scheme(config, "model.layers.3.mlp.down_proj", {}) == QuantScheme(8, 128)
    assert FORMAT.layer_scheme(config, "model.layers.3.mlp.up_proj", {}) == QuantScheme(4, 128, sym=True)
    with pytest.raises(CheckpointError, match="extra_config is"):
        FORMAT.layer_scheme(config | {"extra_config": [1]}, "a", {})


def test_a_quantized_layer_said_to_be_in_16_bits_is_refused() -> None:
    config = CONFIGS["w4-sym-auto_round"] | {"extra_config": {Q: {"bits": 16, "data_type": "float"}}}
    with pytest.raises(CheckpointError, match="data_type is 'float'"):
        FORMAT.layer_scheme(config, Q, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp'; only int"),
        ({"act_bits": 8}, "act_bits is 8"),
        ({"rotation_config": {"hadamard": True}}, "rotation_config is set"),
        ({"bits": "4"}, "bits = '4'; expected an integer"),
        ({"group_size": 0}, "group_size is 0"),
    ],
)
def test_what_is_not_read_is_named(change, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        FORMAT.parse_config(CONFIGS["w4-sym-auto_round"] | change)


@pytest.mark.parametrize("packing", ["auto_round:fp8_static", "auto_round:llm_compressor", "mlx"])
def test_other_packings_are_refused_by_name(packing) -> None:
    with pytest.raises(CheckpointError, match=f"packing_format is '{packing}'; read are auto_round, "):
        FORMAT.configured({"packing_format": packing})


def test_detection_goes_by_the_method() -> None:
    assert FORMAT.detect({"quant_method": "intel/auto-round"}, [f"{Q}.qweight"])
    assert not FORMAT.detect({"quant_method": "gptq"}, [f"{Q}.qweight"])
    assert not FORMAT.detect({"quant_method": "auto-round"}, [f"{Q}.weight"])


def test_its_files_open_as_checkpoints(make_folder) -> None:
    for case in ("w4-asym-auto_round", "w2-sym-auto_round", "w3-asym-auto_round_gptqmodel"):
        tensors = golden(case)
        theirs = tensors.pop("dequantized")
        folder = make_folder(
            {f"{Q}.{name}": tensor for name, tensor in tensors.items()}, {"quantization_config": CONFIGS[case]}, case
        )
        with open_checkpoint(folder) as checkpoint:
            assert checkpoint.format is not None and checkpoint.format.id == "auto-round"
            layer: QuantizedLinear = checkpoint.layer(Q)
        assert torch.equal(dequantize(layer, torch.float16), theirs)
