"""MatMulNBits layers against onnxruntime's own packer, and the folder around them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from formats import Exactness, QuantizedLinear, dequantize, get_format
from formats.conformance import round_trip
from formats.errors import CheckpointError, InputError, MissingExtraError, UnsupportedSchemeError
from formats.model import open_checkpoint
from formats.model_writer import create_model, write_layer
from formats.onnx.decoder import read_decoder, rotary_caches
from formats.types import QuantScheme
from tests.tiny_models import save_tiny_model, tiny_config

GOLDEN = Path(__file__).parent / "golden" / "onnx.safetensors"
ONNX = get_format("onnx")
BITS = [2, 4, 8]
LAYER = "model.layers.1.mlp.up_proj"


def golden(bits: int) -> dict[str, torch.Tensor]:
    return {
        name.partition(".")[2]: tensor for name, tensor in load_file(GOLDEN).items() if name.startswith(f"w{bits}.")
    }


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_of_onnxruntimes_packer(bits) -> None:
    theirs = golden(bits)
    layer = QuantizedLinear(theirs["codes"], theirs["scales"], theirs["zeros"], QuantScheme(bits, 32))
    ours = ONNX.encode(layer)
    assert set(ours) == {"B", "scales", "zero_points"}
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("bits", BITS)
def test_what_onnxruntimes_packer_wrote_is_read(bits) -> None:
    theirs = golden(bits)
    layer = ONNX.decode({name: theirs[name] for name in ("B", "scales", "zero_points")}, QuantScheme(bits, 32))
    assert torch.equal(layer.codes, theirs["codes"])
    assert torch.equal(layer.zeros, theirs["zeros"])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(48, 64, 16), (7, 192, 64), (33, 512, 256), (16, 256, 128)])
def test_onnxruntimes_packer_makes_the_same_bytes_today(make_layer, bits, shape) -> None:
    state = pytest.importorskip("onnxruntime.capi._pybind_state", reason="needs the extra onnx")
    rows, columns, group = shape
    layer = make_layer(bits, group, rows, columns)
    codes = layer.codes.clone().view(rows, -1, group)
    codes[..., 0], codes[..., -1] = 0, 2**bits - 1  # so that min-max finds scale and zero again
    scales = 2.0 ** torch.randint(-8, -2, layer.scales.shape, generator=torch.Generator().manual_seed(1))
    layer = replace(layer, codes=codes.view(rows, columns), scales=scales)
    ours = ONNX.encode(layer)
    theirs = {name: np.zeros_like(tensor.numpy()) for name, tensor in ours.items()}
    pack = getattr(state, f"quantize_matmul_{bits}bits")
    weight = np.ascontiguousarray(dequantize(layer).numpy().T)
    pack(theirs["B"], weight, theirs["scales"], theirs["zero_points"], group, rows, columns, False)
    for name, tensor in ours.items():
        assert np.array_equal(tensor.numpy(), theirs[name]), name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("group", "columns", "block"),
    [(16, 64, 16), (48, 96, 16), (96, 192, 32), (64, 96, 32), (512, 1024, 256), (-1, 1024, 256), (-1, 208, 16)],
)
def test_groups_become_blocks_that_onnxruntime_takes(make_layer, bits, group, columns, block) -> None:
    layer = make_layer(bits, group, 8, columns, scale_dtype=torch.float32)
    tensors = ONNX.encode(layer)
    assert tensors["B"].shape == (8, columns // block, block * bits // 8)
    index = torch.arange(0, columns, block) // layer.scheme.width(columns)
    assert torch.equal(tensors["scales"], layer.scales[:, index])
    found = round_trip(layer, ONNX)
    assert found.ok
    assert found.exactness is Exactness.EXACT


def test_blocks_of_one_group_that_differ_are_damage(make_layer) -> None:
    layer = make_layer(4, 96, 8, 192)
    for name in ("scales", "zero_points"):
        tensors = ONNX.encode(layer)
        tensors[name][2, 1] += 1
        with pytest.raises(CheckpointError, match=f"{name} differ between blocks of one group"):
            ONNX.decode(tensors, layer.scheme)


def test_three_bits_are_stored_in_four_when_asked(make_layer) -> None:
    layer = make_layer(3, 32)
    with pytest.raises(UnsupportedSchemeError, match="--container-bits 4"):
        ONNX.encode(layer)
    wide = get_format("onnx", container_bits="4")
    expected = ONNX.encode(replace(layer, scheme=QuantScheme(4, 32)))
    found = wide.encode(layer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert wide.decode(found, layer.scheme).scheme == layer.scheme
    assert round_trip(layer, wide).ok


def test_a_code_beyond_the_layers_bits_is_damage(make_layer) -> None:
    layer, wide = make_layer(3, 32), get_format("onnx", container_bits="4")
    tensors = wide.encode(layer)
    tensors["B"][0, 0, 0] = 9
    with pytest.raises(CheckpointError, match="the code 9; 3 bits end at 7"):
        wide.decode(tensors, layer.scheme)


def test_a_container_that_is_too_narrow_is_refused(make_layer) -> None:
    with pytest.raises(UnsupportedSchemeError, match="8 bits do not fit --container-bits 4"):
        get_format("onnx", container_bits="4").encode(make_layer(8, 32))


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (QuantScheme(5, 32), (8, 64), "--container-bits 8"),
        (QuantScheme(4, 32, desc_act=True), (8, 64), "desc_act"),
        (QuantScheme(4, 8), (8, 64), "group_size is 8; onnx takes multiples of 16"),
        (QuantScheme(4, -1), (8, 40), "in_features is 40; onnx takes multiples of 16"),
    ],
)
def test_what_the_operator_cannot_hold_is_refused(scheme, shape, message) -> None:
    with pytest.raises(UnsupportedSchemeError, match=message):
        ONNX.check(scheme, *shape)


def test_without_zero_points_every_zero_is_the_middle(make_layer) -> None:
    layer = replace(make_layer(4, 32), zeros=torch.full((64, 4), 8, dtype=torch.int32))
    tensors = ONNX.encode(layer)
    del tensors["zero_points"]
    found = ONNX.decode(tensors, QuantScheme(4, 32))
    assert found.scheme.sym
    assert torch.equal(dequantize(found), dequantize(layer))


def test_half_precision_scales_round_within_their_bound(make_layer) -> None:
    half = get_format("onnx", scale_dtype="float16")
    layer = make_layer(4, 32, scale_dtype=torch.float32)
    found = round_trip(layer, half)
    assert found.ok
    assert found.exactness is Exactness.ROUNDED
    assert found.max_abs_weight_error > 0
    assert round_trip(replace(layer, scales=layer.scales.half()), half).exactness is Exactness.EXACT
    with pytest.raises(UnsupportedSchemeError, match="float16 ends at 65504"):
        half.encode(replace(layer, scales=layer.scales * 1e7))
    with pytest.raises(InputError, match="allowed are float32, float16"):
        get_format("onnx", scale_dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("B", lambda tensor: tensor.to(torch.int8)),
        ("scales", lambda tensor: tensor[:, :2]),
        ("scales", lambda tensor: tensor.double()),
        ("zero_points", lambda tensor: tensor[:, :1]),
        ("scales", lambda tensor: tensor * float("nan")),
    ],
)
def test_tensors_that_contradict_the_scheme_are_named(make_layer, name, change) -> None:
    tensors = ONNX.encode(make_layer(4, 32))
    with pytest.raises(CheckpointError, match=name):
        ONNX.decode({**tensors, name: change(tensors[name])}, QuantScheme(4, 32))


def test_options_and_layers_of_their_own_schemes_are_read_back() -> None:
    fmt = get_format("onnx", scale_dtype="float16", container_bits="4", accuracy_level="4")
    config = fmt.quantization_config(QuantScheme(3, 64), ("lm_head",), {LAYER: QuantScheme(4, 32, sym=True)})
    found = ONNX.configured(json.loads(json.dumps(config)))
    assert (found.scale_dtype, found.container_bits, found.accuracy_level) == (torch.float16, 4, 4)
    assert found.layer_scheme(config, LAYER, {}) == QuantScheme(4, 32, sym=True)
    assert found.layer_scheme(config, "other", {}) == QuantScheme(3, 64)
    for damage in ({"container_bits": 5}, {"accuracy_level": "fast"}):
        with pytest.raises(CheckpointError, match="container_bits is"):
            ONNX.configured({**config, **damage})


def test_the_package_onnx_is_loaded_only_when_needed() -> None:
    code = "import sys, formats.onnx; formats.get_format('onnx'); assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_caches_are_those_of_transformers(kind) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415

    config = tiny_config("llama")
    config.rope_parameters = ROPES[kind]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(128)[None])
    ours = rotary_caches(read_decoder(config.to_dict()))
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        assert torch.allclose(mine, theirs[0, :, :8], rtol=0, atol=2e-6)  # angles reach 127: half an ulp is 4e-6


def test_configurations_of_older_transformers_are_read() -> None:
    config = tiny_config("llama").to_dict()
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    decoder = read_decoder(config)
    assert (decoder.head_size, decoder.rope["rope_type"]) == (16, "linear")
    assert (decoder.rope["rope_theta"], decoder.rope["factor"]) == (5000.0, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2'; it has llama, mistral, phi3, qwen2, qwen3, smollm3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
)
def test_models_without_a_graph_are_refused_by_what_is_missing(change, message) -> None:
    with pytest.raises(UnsupportedSchemeError, match=message):
        read_decoder({**tiny_config("llama").to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers None"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps 'small'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor None for rope_type linear"),
    ],
)
def test_numbers_that_are_missing_are_named(change, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_decoder({**tiny_config("llama").to_dict(), **change})


WINDOWED = {"sliding_window": 8, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("family", "change", "windows"),
    [
        ("mistral", {}, (8, 8)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("llama", {"sliding_window": 8}, (None, None)),
        ("qwen2", {"sliding_window": 8}, (None, None)),
        ("qwen2", {**WINDOWED, "layer_types": None, "max_window_layers": 1}, (None, 8)),
        ("qwen3", {**WINDOWED, "layer_types": ["sliding_attention", "full_attention"]}, (8, None)),
    ],
)
def test_sliding_windows_are_where_transformers_has_them(family, change, windows) -> None:
    assert read_decoder({**tiny_config(family).to_dict(), **change}).windows == windows


def test_smollm3_has_layers_without_positions() -> None:
    config = tiny_config("smollm3").to_dict()
    assert read_decoder(config).rotated == (True, False)
    windowed = {**config, **WINDOWED, "layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 2}
    assert read_decoder(windowed).rotated == (True, False)
    assert read_decoder(windowed).windows == (None, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny native checkpoint whose head is in full precision."""
    from formats import round_to_nearest  # noqa: PLC0415
    from formats.checkpoint import CheckpointWriter  # noqa: PLC0415
    from formats.model_writer import write_model_config  # noqa: PLC0415

    dense = save_tiny_model(tmp_path_factory.mktemp("dense"), "llama", dtype=torch.bfloat16)
    folder, scheme, form = tmp_path_factory.mktemp("native") / "model", QuantScheme(2, 32), get_format("native")
    with open_checkpoint(dense) as model, CheckpointWriter(folder) as writer:
        for name in model.passthrough_names:
            if name.endswith("_proj.weight"):
                layer = round_to_nearest(model.get(name).float(), scheme)
                write_layer(writer, form, name.removesuffix(".weight"), layer)
            else:
                writer.add(name, model.get(name))
        write_model_config(writer, model.reader.config, form, scheme)
        writer.copy_companions(dense)
    return folder


def export(source: Path, out: Path, **options) -> Path:
    pytest.importorskip("onnx", reason="needs the extra onnx")
    shard_size = options.pop("shard_size", 10**9)
    fmt = get_format("onnx", **options)
    with open_checkpoint(source) as model, create_model(fmt, out, model, shard_size=shard_size) as writer:
        for name in model.layer_names:
            write_layer(writer, fmt, name, model.packed_layer(name))
        for name in model.passthrough_names:
            writer.add(name, model.get(name))
        writer.finish()
    return out


@pytest.mark.parametrize("shard_size", [10**9, 20000])
def test_a_folder_is_read_back_bit_for_bit(source, tmp_path, shard_size) -> None:
    out = export(source, tmp_path / "out", shard_size=shard_size)
    data = sorted(path.name for path in out.glob("model.onnx.data*"))
    assert (data == ["model.onnx.data"]) == (shard_size == 10**9)
    with open_checkpoint(source) as before, open_checkpoint(out) as after:
        assert after.format.id == "onnx"
        assert after.scheme == before.scheme
        assert set(after.layer_names) == set(before.layer_names)
        assert set(after.passthrough_names) == set(before.passthrough_names)
        assert after.ignore == before.ignore
        for name in before.layer_names:
            assert torch.equal(after.layer(name).codes, before.layer(name).codes)
            assert torch.equal(dequantize(after.layer(name)), dequantize(before.layer(name)))
        for name in before.passthrough_names:
            assert after.get(name).dtype == before.get(name).dtype == torch.bfloat16
            assert torch.equal(after.get(name), before.get(name))


def test_the_folder_has_what_generation_needs(source, tmp_path) -> None:
    out = export(source, tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "genai_config.json", "tokenizer.json", "model.onnx", "model.onnx.data"} <= names
    genai = json.loads((out / "genai_config.json").read_text())
    assert genai["model"]["type"] == "llama"
    assert genai["model"]["decoder"]["filename"] == "model.onnx"
    assert genai["model"]["eos_token_id"] == genai["model"]["pad_token_id"] == 0


def test_two_exports_are_the_same_bytes(source, tmp_path) -> None:
    first, second = export(source, tmp_path / "a"), export(source, tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_tensor_without_a_place_is_refused_before_anything_is_written(source, tmp_path) -> None:
    pytest.importorskip("onnx", reason="needs the extra onnx")
    with open_checkpoint(source) as model:
        model.passthrough_names += ("model.layers.0.self_attn.q_norm.weight",)
        model.reader.tensors = {
            **model.reader.tensors,
            model.passthrough_names[-1]: model.reader.tensors["lm_head.weight"],
        }
        with pytest.raises(UnsupportedSchemeError, match=r"no place for model\.layers\.0\.self_attn\.q_norm\.weight"):
            create_model(ONNX, tmp_path / "out", model)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_the_decoder_needs_is_missed_before_anything_is_written(source, tmp_path) -> None:
    pytest.importorskip("onnx", reason="needs the extra onnx")
    with open_checkpoint(source) as model:
        model.passthrough_names = tuple(name for name in model.passthrough_names if name != "model.norm.weight")
        with pytest.raises(CheckpointError, match=r"no tensor model\.norm\.weight"):
            create_model(ONNX, tmp_path / "out", model)


def test_a_failed_export_leaves_nothing(source, tmp_path) -> None:
    pytest.importorskip("onnx", reason="needs the extra onnx")
    with pytest.raises(KeyboardInterrupt), open_checkpoint(source) as model:
        with create_model(ONNX, tmp_path / "out", model) as writer:
            writer.add("model.norm.weight", model.get("model.norm.weight"))
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def cut(folder: Path) -> None:
    path = folder / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])


def lose(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def garble(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 64)


def rename_a_node(folder: Path) -> None:
    import onnx  # noqa: PLC0415

    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    next(node for node in graph.graph.node if node.op_type == "MatMulNBits").name = "/somebody/elses"
    (folder / "model.onnx").write_bytes(graph.SerializeToString())


def wrong_group_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "fetch it again"),
        (lose, r"model\.onnx\.data is missing"),
        (garble, r"cannot read .*model\.onnx"),
        (rename_a_node, "eqat's nodes are named like the layer"),
        (wrong_group_size, r"B is uint8 \[128, 2, 8\]; expected uint8 \[128, 4, 4\]"),
    ],
)
def test_a_damaged_folder_is_named(source, tmp_path, damage, message) -> None:
    out = export(source, tmp_path / "out")
    damage(out)
    with pytest.raises(CheckpointError, match=message), open_checkpoint(out) as model:
        model.layer(LAYER)


def test_only_folders_of_ours_are_claimed(source, tmp_path) -> None:
    out = export(source, tmp_path / "out")
    assert ONNX.reads(out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (out / "config.json").write_text(json.dumps(config))
    assert not ONNX.reads(out)
    shutil.rmtree(out)
    assert not ONNX.reads(out)


def test_a_missing_package_is_named_with_the_command(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("formats.onnx.extra.importlib.util.find_spec", lambda name: None)
    with open_checkpoint(source) as model, pytest.raises(MissingExtraError, match=r"pip install '.*\[onnx\]'"):
        create_model(ONNX, tmp_path / "out", model)
