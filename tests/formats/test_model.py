"""Whole checkpoints: detection, layers, the full-precision state dict, and configs written for readers."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from formats import dequantize, get_format
from formats.checkpoint import CheckpointWriter
from formats.errors import CheckpointError, UnknownFormatError, UnsupportedSchemeError
from formats.model import open_checkpoint
from formats.model_writer import write_layer, write_model_config
from formats.types import QuantScheme

Q, UP, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate"
OTHERS = {
    "model.embed_tokens.weight": torch.ones(10, 128, dtype=torch.bfloat16),
    f"{GATE}.weight": torch.ones(4, 128),
    "model.norm.weight": torch.full((128,), 2.0),
    "counter": torch.tensor(7),
}


@pytest.fixture
def quantized(make_layer, make_folder):
    """A folder with two quantized layers and the layers themselves."""

    def build(format_id: str, bits: int = 4, scheme: QuantScheme | None = None, **changes):
        fmt = get_format(format_id)
        layers = {Q: make_layer(bits, 32, bias=True, seed=1), UP: make_layer(bits, 32, 96, seed=2)}
        tensors = {f"{name}.{local}": t for name, layer in layers.items() for local, t in fmt.encode(layer).items()}
        config = fmt.quantization_config(scheme or QuantScheme(bits, 32)) | changes
        return make_folder(OTHERS | tensors, {"quantization_config": config}, name=f"{format_id}{bits}"), layers

    return build


@pytest.mark.parametrize("format_id", ["native", "gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_checkpoint_is_recognised_and_read(quantized, format_id, bits) -> None:
    folder, layers = quantized(format_id, bits)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format.id == format_id
        assert checkpoint.scheme == QuantScheme(bits, 32)
        assert set(checkpoint.layer_names) == {Q, UP}
        assert set(checkpoint.passthrough_names) == set(OTHERS)
        assert set(checkpoint.ignore) == {"lm_head", GATE}
        for name, layer in layers.items():
            assert torch.equal(dequantize(checkpoint.layer(name)), dequantize(layer))
            assert checkpoint.layer_scheme(name) == QuantScheme(bits, 32)


@pytest.mark.parametrize("format_id", ["native", "gptq", "gptq_v2"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_the_dense_state_dict_is_complete(quantized, format_id, dtype) -> None:
    folder, layers = quantized(format_id)
    with open_checkpoint(folder) as checkpoint:
        found = dict(checkpoint.dense_tensors(dtype))
    assert set(found) == {*OTHERS, f"{Q}.weight", f"{Q}.bias", f"{UP}.weight"}
    assert torch.equal(found[f"{Q}.weight"], dequantize(layers[Q]).to(dtype or torch.float32))
    assert torch.equal(found[f"{Q}.bias"], layers[Q].bias.to(dtype or torch.float16))
    assert found["model.embed_tokens.weight"].dtype is (dtype or torch.bfloat16)
    assert found["counter"].dtype is torch.int64


def test_full_precision_has_no_format(make_folder) -> None:
    with open_checkpoint(make_folder(OTHERS)) as checkpoint:
        assert checkpoint.format is None
        assert checkpoint.scheme is None
        assert checkpoint.layer_names == ()
        assert set(dict(checkpoint.dense_tensors())) == set(OTHERS)
        with pytest.raises(CheckpointError, match="full precision"):
            checkpoint.layer(Q)


def test_a_format_can_be_named_against_a_wrong_label(quantized) -> None:
    folder, layers = quantized("gptq_v2", 4, checkpoint_format="gptq", format="gptq")
    with open_checkpoint(folder) as wrong, open_checkpoint(folder, "gptq_v2") as right:
        assert not torch.equal(dequantize(wrong.layer(Q)), dequantize(layers[Q]))
        assert torch.equal(dequantize(right.layer(Q)), dequantize(layers[Q]))


def test_contradicting_labels_are_refused_until_named(quantized) -> None:
    folder, layers = quantized("gptq_v2", 4, checkpoint_format="gptq")
    with pytest.raises(UnknownFormatError, match=r"checkpoint_format 'gptq', format 'gptq_v2'"):
        open_checkpoint(folder)
    with open_checkpoint(folder, "gptq_v2") as checkpoint:
        assert torch.equal(dequantize(checkpoint.layer(Q)), dequantize(layers[Q]))


@pytest.mark.parametrize("config", [{"quant_method": "hqq", "bits": 4}, {"quant_method": "gptq", "format": "marlin"}])
def test_unknown_quantization_is_named(quantized, config) -> None:
    folder, _ = quantized("gptq")
    (folder / "quantize_config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownFormatError, match=r"known are native, gptq, gptq_v2, ") as caught:
        open_checkpoint(folder)
    assert config["quant_method"] in str(caught.value)


def test_quantized_tensors_without_a_config_are_not_taken_for_dense(make_folder) -> None:
    folder = make_folder({"a.qweight": torch.zeros(4, 4, dtype=torch.int32)})
    with pytest.raises(UnknownFormatError, match=r"tensor 'a\.qweight', no configuration"):
        open_checkpoint(folder)


def test_naming_a_format_needs_a_layer_in_it(make_folder) -> None:
    with pytest.raises(CheckpointError, match=re.escape("no tensor is named *.qweight")):
        open_checkpoint(make_folder(OTHERS), "gptq")


@pytest.mark.parametrize("missing", ["qzeros", "scales"])
def test_an_incomplete_layer_is_named(quantized, make_folder, missing) -> None:
    folder, _ = quantized("gptq")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{UP}.{missing}"]
    config = json.loads((folder / "config.json").read_text())
    with open_checkpoint(make_folder(tensors, config, name="broken")) as checkpoint:
        checkpoint.layer(Q)
        with pytest.raises(CheckpointError, match=f"layer {UP} .*no {missing}"):
            checkpoint.layer(UP)


def test_a_layer_that_contradicts_the_config_is_named(quantized) -> None:
    folder, _ = quantized("gptq", 4, scheme=QuantScheme(4, 64))
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=f"layer {Q} .*has shape"):
        checkpoint.layer(Q)


@pytest.mark.parametrize("target", ["native", "gptq", "gptq_v2"])
@pytest.mark.parametrize("source", ["native", "gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_any_format_converts_to_any_other(quantized, tmp_path, source, target, bits) -> None:
    folder, layers = quantized(source, bits)
    fmt = get_format(target)
    with open_checkpoint(folder) as checkpoint, CheckpointWriter(tmp_path / "out") as writer:
        for name in checkpoint.layer_names:
            write_layer(writer, fmt, name, checkpoint.packed_layer(name))
        write_model_config(writer, checkpoint.reader.config, fmt, checkpoint.scheme, checkpoint.ignore)
    with open_checkpoint(tmp_path / "out") as found:
        assert found.format.id == target
        for name, layer in layers.items():
            assert torch.equal(dequantize(found.layer(name)), dequantize(layer))


@pytest.mark.parametrize("target", ["native", "gptq", "gptq_v2"])
def test_layers_of_several_schemes_convert(make_layer, make_folder, tmp_path, target) -> None:
    native, fmt = get_format("native"), get_format(target)
    layers = {Q: make_layer(2, 32), UP: make_layer(8, -1)}
    tensors = {f"{name}.{local}": t for name, layer in layers.items() for local, t in native.encode(layer).items()}
    config = native.quantization_config(QuantScheme(2, 32), overrides={UP: QuantScheme(8, -1)})
    folder = make_folder(tensors, {"quantization_config": config})
    with open_checkpoint(folder) as checkpoint, CheckpointWriter(tmp_path / "out") as writer:
        assert checkpoint.overrides == {UP: QuantScheme(8, -1)}
        for name in checkpoint.layer_names:
            write_layer(writer, fmt, name, checkpoint.packed_layer(name))
        write_model_config(writer, {}, fmt, checkpoint.scheme, overrides=checkpoint.overrides)
    with open_checkpoint(tmp_path / "out") as found:
        assert found.overrides == {UP: QuantScheme(8, -1)}
        for name, layer in layers.items():
            assert torch.equal(dequantize(found.layer(name)), dequantize(layer))


def test_a_layer_that_cannot_be_held_is_named(make_layer, tmp_path) -> None:
    with (
        pytest.raises(UnsupportedSchemeError, match=r"layer model\.odd: in_features is 70"),
        CheckpointWriter(tmp_path / "out") as writer,
    ):
        write_layer(writer, get_format("gptq"), "model.odd", make_layer(3, 10, 32, 70))
    assert not (tmp_path / "out").exists()


def test_converting_names_the_layer_that_cannot_be_held(make_layer, make_folder, tmp_path) -> None:
    native = get_format("native")
    tensors = {f"model.odd.{local}": t for local, t in native.encode(make_layer(4, 48, 64, 128)).items()}
    folder = make_folder(tensors, {"quantization_config": native.quantization_config(QuantScheme(4, 48))})
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(UnsupportedSchemeError, match=r"layer model\.odd: group_size 48"),
        CheckpointWriter(tmp_path / "out") as writer,
    ):
        write_layer(writer, get_format("gptq_v2"), "model.odd", checkpoint.packed_layer("model.odd"))


SOURCE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "quantization_config": {"quant_method": "eqat"},
    "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "linear", "factor": 2.0},
}


@pytest.mark.parametrize(
    ("format_id", "options", "dtype"),
    [
        ("gptq", {}, "float16"),
        ("gptq_v2", {}, "float16"),
        ("dense", {"dtype": "float32"}, "float32"),
        ("native", {}, "bfloat16"),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_configs_keep_every_field_and_name_the_dtype(tmp_path, format_id, options, dtype, key) -> None:
    source = {key if name == "torch_dtype" else name: value for name, value in SOURCE_CONFIG.items()}
    fmt = get_format(format_id, **options)
    with CheckpointWriter(tmp_path / "out") as writer:
        write_model_config(writer, source, fmt, QuantScheme(2, 64))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config", {})
    assert quantization == fmt.quantization_config(QuantScheme(2, 64))
    assert config == {name: value for name, value in source.items() if name != "quantization_config"} | {key: dtype}
    sidecars = {path.name for path in (tmp_path / "out").iterdir()} - {"config.json"}
    assert sidecars == ({"quantize_config.json"} if format_id.startswith("gptq") else set())


def test_a_config_without_a_dtype_gets_one(tmp_path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        write_model_config(writer, {}, get_format("dense"), QuantScheme(2, 64))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "float16"}
