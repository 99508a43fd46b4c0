"""compressed-tensors: bytes and weights of the library itself, other versions' layouts, configurations, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats import QuantScheme, dequantize, get_format
from formats.base import Exactness
from formats.compressed_tensors_config import config_groups, group_for
from formats.errors import CheckpointError, UnsupportedSchemeError
from formats.model import open_checkpoint
from formats.model_writer import create_model, write_layer

GOLDEN = Path(__file__).parent / "golden" / "compressed-tensors"
FORMAT = get_format("compressed-tensors")


def golden(version: str) -> dict[str, dict[str, torch.Tensor]]:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(GOLDEN / f"layers_{version}.safetensors").items():
        layer, _, local = name.partition(".")
        layers.setdefault(layer, {})[local] = tensor
    return layers


def scheme_of(name: str) -> QuantScheme:
    """The scheme a golden layer is named for, as a configuration would state it: ``w3_asym_16_order``."""
    bits, symmetry, group, *order = name.split("_")
    size = -1 if group == "channel" else int(group)
    return QuantScheme(int(bits[1:]), size, sym=symmetry == "sym", desc_act=bool(order))


CASES = [(version, name) for version in ("0.20", "0.13", "0.8") for name in golden(version)]


@pytest.mark.parametrize(("version", "name"), CASES)
def test_golden_layers_have_the_librarys_own_weights(version: str, name: str) -> None:
    tensors = golden(version)[name]
    expected = tensors.pop("dequant")
    layer = FORMAT.decode(tensors, scheme_of(name))
    assert layer.scheme.desc_act is scheme_of(name).desc_act
    assert torch.equal(dequantize(layer, torch.float16), expected)
    assert torch.equal(dequantize(layer).half(), expected)


@pytest.mark.parametrize("name", golden("0.20"))
def test_what_it_writes_are_the_librarys_own_bytes(name: str) -> None:
    tensors = golden("0.20")[name]
    del tensors["dequant"]
    layer = FORMAT.decode(tensors, scheme_of(name))
    written = FORMAT.encode(replace(layer, scheme=scheme_of(name)))
    assert set(written) == set(tensors)
    for local, tensor in tensors.items():
        assert written[local].dtype == tensor.dtype
        assert torch.equal(written[local], tensor), local


def test_old_layouts_are_written_as_the_new_one() -> None:
    for name in ("w3_asym_16", "w6_asym_16"):
        tensors = golden("0.13")[name]
        layer = FORMAT.decode(tensors, scheme_of(name))
        written = FORMAT.encode(layer)
        assert written["weight_packed"].shape[1] == layer.in_features * layer.scheme.bits // 32
        assert written["weight_packed"].shape[1] < tensors["weight_packed"].shape[1]
        assert torch.equal(dequantize(FORMAT.decode(written, layer.scheme)), dequantize(layer))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("target", ["native", "gptq_v2"])
def test_words_are_those_of_other_streams_transposed(make_layer, bits: int, target: str) -> None:
    layer = make_layer(bits, 32)
    packed = FORMAT.encode(layer)
    other = get_format(target)
    moved = other.encode_packed(FORMAT.decode_packed(packed, layer.scheme))
    assert all(torch.equal(moved[name], tensor) for name, tensor in other.encode(layer).items())
    assert all(tensor.is_contiguous() for tensor in moved.values())
    if target == "gptq_v2":
        assert torch.equal(packed["weight_packed"], moved["qweight"].T)
        assert torch.equal(packed["weight_zero_point"], moved["qzeros"].T)


class TestScales:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_are_stored_in_the_dtype_that_the_model_then_names(self, make_layer, dtype: str) -> None:
        fmt = get_format("compressed-tensors", scale_dtype=dtype)
        layer = make_layer(4, 32, scale_dtype=getattr(torch, dtype))
        assert fmt.encode(layer)["weight_scale"].dtype is getattr(torch, dtype)
        assert fmt.model_dtype() is getattr(torch, dtype)
        assert fmt.exactness(layer) is Exactness.EXACT

    def test_of_fp32_are_exact_only_in_fp32(self, make_layer) -> None:
        layer = make_layer(4, 32, scale_dtype=torch.float32)
        assert FORMAT.exactness(layer) is Exactness.ROUNDED
        assert get_format("compressed-tensors", scale_dtype="float32").exactness(layer) is Exactness.EXACT

    def test_beyond_fp16_are_refused_with_the_way_out(self, make_layer) -> None:
        layer = make_layer(4, 32, scale_dtype=torch.float32)
        layer.scales[0, 0] = 1e6
        with pytest.raises(UnsupportedSchemeError, match=r"1e\+06.*--scale-dtype float32"):
            FORMAT.encode(layer)
        assert get_format("compressed-tensors", scale_dtype="float32").encode(layer)["weight_scale"][0, 0] == 1e6


class TestZeroPoints:
    def test_are_absent_from_symmetric_layers(self, make_layer) -> None:
        layer = make_layer(4, 32)
        middle = replace(layer, zeros=torch.full_like(layer.zeros, 8), scheme=QuantScheme(4, 32, sym=True))
        assert "weight_zero_point" not in FORMAT.encode(middle)
        assert torch.equal(FORMAT.decode(FORMAT.encode(middle), middle.scheme).zeros, middle.zeros)

    def test_all_in_the_middle_are_kept_where_the_configuration_says_asymmetric(self, make_layer) -> None:
        layer = make_layer(4, 32)
        middle = replace(layer, zeros=torch.full_like(layer.zeros, 8))
        assert torch.equal(FORMAT.decode(FORMAT.encode(middle), QuantScheme(4, 32)).zeros, middle.zeros)

    def test_missing_are_named(self, make_layer) -> None:
        tensors = FORMAT.encode(make_layer(4, 32))
        del tensors["weight_zero_point"]
        with pytest.raises(CheckpointError, match="no weight_zero_point"):
            FORMAT.decode(tensors, QuantScheme(4, 32))

    def test_that_move_a_symmetric_layer_are_named(self, make_layer) -> None:
        with pytest.raises(CheckpointError, match="symmetric: true"):
            FORMAT.decode(FORMAT.encode(make_layer(4, 32)), QuantScheme(4, 32, sym=True))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "weight_packed",
            lambda t: t[:, :-1].contiguous(),
            r"weight_packed has rows of 15 words; 128 values of 4 bits take 16",
        ),
        ("weight_packed", lambda t: t.long(), r"weight_packed: words are torch.int64"),
        ("weight_scale", lambda t: t[:-1].contiguous(), r"scales have shape \[63, 4\]"),
        ("weight_zero_point", lambda t: t[:, :-1].contiguous(), r"weight_zero_point has shape \[8, 3\]"),
        ("weight_zero_point", lambda t: t[:-1].contiguous(), r"weight_zero_point: words are torch.int32 \[7, 4\]"),
        ("weight_shape", lambda t: t + 1, r"weight_shape is \[65, 129\]"),
    ],
)
def test_tensors_that_contradict_each_other_are_named(make_layer, name, change, message) -> None:
    tensors = FORMAT.encode(make_layer(4, 32))
    tensors[name] = change(tensors[name])
    with pytest.raises(CheckpointError, match=message):
        FORMAT.decode(tensors, QuantScheme(4, 32))


def test_rows_that_end_inside_a_word_need_groups() -> None:
    FORMAT.check(QuantScheme(3, 16), 20, 80)
    with pytest.raises(UnsupportedSchemeError, match="in_features 80 at 3 bits ends inside a word"):
        FORMAT.check(QuantScheme(3, -1), 20, 80)


class TestCheckpointOfThreeGroups:
    """The library's own folder: 4-bit symmetric attention, 8-bit rows, 3-bit rest, two layers ignored."""

    def test_every_layer_has_its_scheme_and_the_librarys_weights(self) -> None:
        expected = load_file(GOLDEN / "mixed_dequant.safetensors")
        with open_checkpoint(GOLDEN / "mixed") as checkpoint:
            assert checkpoint.format is not None and checkpoint.format.id == "compressed-tensors"
            assert set(checkpoint.layer_names) == set(expected)
            for name, weight in expected.items():
                assert torch.equal(dequantize(checkpoint.layer(name), torch.float16), weight), name
            scheme = checkpoint.layer_scheme
            assert scheme("model.layers.0.self_attn.q_proj") == QuantScheme(4, 16, sym=True)
            assert scheme("model.layers.1.self_attn.q_proj") == QuantScheme(8, -1)  # a path beats a pattern
            assert scheme("model.layers.0.mlp.down_proj") == QuantScheme(8, -1)  # a pattern beats a class
            assert checkpoint.scheme == scheme("model.layers.0.self_attn.o_proj") == QuantScheme(3, 16)
            assert set(checkpoint.ignore) == {
                "lm_head",
                *(f"model.layers.0.mlp.{gate}_proj" for gate in ("gate", "up")),
            }

    def test_its_configuration_written_anew_says_the_same(self) -> None:
        with open_checkpoint(GOLDEN / "mixed") as checkpoint:
            written = FORMAT.quantization_config(checkpoint.scheme, checkpoint.ignore, checkpoint.overrides)
            written = json.loads(json.dumps(written))
            for name in checkpoint.layer_names:
                assert FORMAT.layer_scheme(written, name, {}) == checkpoint.layer_scheme(name)


def test_the_configurations_key_of_2024_is_read_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(GOLDEN / "mixed", folder)
    given = json.loads((folder / "config.json").read_text())
    given["compression_config"] = given.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(given))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.scheme == QuantScheme(3, 16)
        with create_model(FORMAT, tmp_path / "new", checkpoint) as writer:
            for name in checkpoint.layer_names:
                write_layer(writer, FORMAT, name, checkpoint.layer(name))
            writer.finish()
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "compression_config" not in written and "quantization_config" in written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "float-quantized"}, "has format 'float-quantized'; only pack-quantized is read; make a full-prec"),
        ({}, r"has no compressed-tensors layer: no tensor is named \*\.weight_packed"),
    ],
)
def test_folders_of_other_formats_are_refused_with_the_way_out(make_folder, change: dict, message: str) -> None:
    groups = {"g": {"targets": ["Linear"], "weights": weights()}}
    folder = make_folder({"a.weight": torch.ones(4, 4)}, {"quantization_config": config(groups) | change})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def config(groups: dict, **fields: object) -> dict:
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **fields}


def weights(**fields: object) -> dict:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, **fields}


class TestConfiguration:
    def test_ignored_modules_may_be_patterns(self) -> None:
        given = config({"g": {"targets": ["Linear"], "weights": weights()}}, ignore=["re:.*gate$"])
        assert FORMAT.layer_scheme(given, "model.layers.0.mlp.gate_proj", {}).bits == 4
        with pytest.raises(CheckpointError, match=r"ignore names it \('re:\.\*gate\$'\)"):
            FORMAT.layer_scheme(given, "model.layers.0.mlp.gate", {})

    def test_patterns_are_matched_from_the_start_of_the_path(self) -> None:
        groups = config_groups(config({"g": {"targets": ["re:layers"], "weights": weights()}}))
        assert group_for(groups, (), "layers.0.mlp.up").name == "g"
        with pytest.raises(CheckpointError, match="no config group targets it; their targets are re:layers"):
            group_for(groups, (), "model.layers.0.mlp.up")

    def test_groups_without_weights_are_passed_over(self) -> None:
        attention = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8}}
        given = config({"kv": attention, "g": {"targets": ["Linear"], "weights": weights(num_bits=8)}})
        assert FORMAT.parse_config(given).bits == 8

    @pytest.mark.parametrize(
        ("fields", "scheme"),
        [
            ({"strategy": None, "group_size": 64}, QuantScheme(4, 64, sym=True)),
            ({"strategy": None, "group_size": -1}, QuantScheme(4, -1, sym=True)),
            ({"strategy": "channel", "group_size": None}, QuantScheme(4, -1, sym=True)),
            ({"actorder": "weight"}, QuantScheme(4, 128, sym=True)),
            ({"actorder": "group"}, QuantScheme(4, 128, sym=True, desc_act=True)),
            ({"actorder": True}, QuantScheme(4, 128, sym=True, desc_act=True)),
            ({"symmetric": False, "observer": "mse", "block_structure": None}, QuantScheme(4, 128)),
        ],
    )
    def test_older_and_shorter_groups_are_read(self, fields: dict, scheme: QuantScheme) -> None:
        assert FORMAT.parse_config(config({"g": {"targets": ["Linear"], "weights": weights(**fields)}})) == scheme

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"type": "float"}, "type is 'float'"),
            ({"strategy": "tensor", "group_size": None}, "strategy is 'tensor'"),
            ({"strategy": None, "group_size": None}, "strategy is 'tensor'"),
            ({"strategy": "group", "group_size": None}, "without a group_size"),
            ({"strategy": "block"}, "strategy is 'block'"),
            ({"dynamic": True}, "dynamic is True"),
            ({"num_bits": 16}, "bits is 16"),
            ({"actorder": "columns"}, "actorder is 'columns'"),
        ],
    )
    def test_weights_that_cannot_be_read_are_named(self, fields: dict, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            FORMAT.parse_config(config({"g": {"targets": ["Linear"], "weights": weights(**fields)}}))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"config_groups": None}, "config_groups is None"),
            ({"config_groups": {"W4A16": ["Linear"]}}, "config group 'W4A16'"),
            ({"config_groups": {"g": {"targets": ["Linear"], "weights": None}}}, "no config group quantizes weights"),
            ({"format": "float-quantized"}, "format 'float-quantized'; only pack-quantized is read; make a full"),
            ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
            ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is set"),
            ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config is set"),
            ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set"),
        ],
    )
    def test_configurations_that_cannot_be_read_are_named(self, given: dict, message: str) -> None:
        whole = config({"g": {"targets": ["Linear"], "weights": weights()}}) | given
        with pytest.raises(CheckpointError, match=message):
            FORMAT.parse_config(whole)

    @pytest.mark.parametrize("key", ["input_activations", "output_activations"])
    def test_quantized_activations_are_refused(self, key: str) -> None:
        group = {"targets": ["Linear"], "weights": weights(), key: {"num_bits": 8}}
        with pytest.raises(CheckpointError, match=f"has {key}; only weights are read"):
            FORMAT.parse_config(config({"g": group}))

    def test_a_format_of_the_group_beats_the_models(self) -> None:
        group = {"targets": ["Linear"], "weights": weights(), "format": "pack-quantized"}
        assert FORMAT.parse_config(config({"g": group}, format="mixed-precision")).bits == 4

    def test_a_damaged_pattern_is_named(self) -> None:
        with pytest.raises(CheckpointError, match=r"'re:\(' is no regular expression"):
            FORMAT.parse_config(config({"g": {"targets": ["re:("], "weights": weights()}}))

    def test_a_quantized_head_is_named(self) -> None:
        head = FORMAT.quantization_config(QuantScheme(4, 128), ())
        assert head["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
        usual = FORMAT.quantization_config(QuantScheme(4, 128))
        assert usual["config_groups"]["group_0"]["targets"] == ["Linear"] and usual["ignore"] == ["lm_head"]
