"""``AutoModelForCausalLM.from_pretrained`` on native checkpoints, against float64 on the dequantized weights."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import act_order_layer, leave_out, mix, quantize_folder, raw_tensors
from tiny_models import save_tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import eqat_train  # noqa: F401  registers the quantizer
from eqat_train.inference import transformers_quantizer
from eqat_train.inference.packed_linear import PackedLinear
from eqat_train.models.loading import load_dense_model
from formats import QuantizedLinear, QuantScheme
from formats.errors import CheckpointError, InputError
from formats.model import open_checkpoint

IDS = tiny_tokens(2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def native(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_folder(dense, tmp_path_factory.mktemp("native") / "w2g32", QuantScheme(2, 32))


def load(folder: Path, **options: object) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def exact_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_dense_model(folder).double()(IDS).logits


@torch.no_grad()
def distance(model: PreTrainedModel, expected: Tensor) -> float:
    return float((model(IDS).logits.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_logits_are_those_of_the_dequantized_weights(dense: Path, tmp_path: Path, bits: int) -> None:
    folder = quantize_folder(dense, tmp_path / "q", QuantScheme(bits, 32))
    model = load(folder, dtype=torch.float32)
    assert len(packed_layers(model)) == 14
    assert distance(model, exact_logits(folder)) < 1e-6


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2", "phi3"])
def test_architectures_with_biases_tied_heads_and_fused_layers(tmp_path: Path, architecture: str) -> None:
    folder = quantize_folder(save_tiny_model(tmp_path / "model", architecture), tmp_path / "q", QuantScheme(3, -1))
    assert distance(load(folder, dtype=torch.float32), exact_logits(folder)) < 1e-6


def test_act_order_is_honoured(dense: Path, tmp_path: Path) -> None:
    folder = quantize_folder(dense, tmp_path / "q", QuantScheme(4, 32), change=act_order_layer)
    model = load(folder, dtype=torch.float32)
    assert all(layer.act_order for layer in packed_layers(model).values())
    assert distance(model, exact_logits(folder)) < 1e-6


def test_layers_of_their_own_scheme_and_layers_left_out(dense: Path, native: Path, tmp_path: Path) -> None:
    other = quantize_folder(dense, tmp_path / "w4", QuantScheme(4, 16))
    left_out, finer = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"
    folder = leave_out(native, tmp_path / "ignored", left_out)
    model = load(folder, dtype=torch.float32)
    assert type(model.get_submodule(left_out)) is nn.Linear and left_out not in packed_layers(model)
    assert distance(model, exact_logits(folder)) < 1e-6

    folder = mix(native, other, tmp_path / "mixed", finer)
    model = load(folder, dtype=torch.float32)
    assert (packed_layers(model)[finer].bits, packed_layers(model)[finer].group_size) == (4, 16)
    assert distance(model, exact_logits(folder)) < 1e-6


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_the_dtype_argument_casts_all_but_the_scales(
    dense: Path, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, bound: float
) -> None:
    def change(layer: QuantizedLinear) -> QuantizedLinear:
        return replace(layer, scales=layer.scales.to(stored))

    folder = quantize_folder(dense, tmp_path / "q", QuantScheme(2, 32), change=change)
    model = load(folder, dtype=dtype)
    assert model.dtype == dtype == model.model.norm.weight.dtype
    assert all(layer.scales.dtype == stored for layer in packed_layers(model).values())
    assert distance(model, exact_logits(folder)) < bound


def test_casting_a_loaded_model_leaves_the_scales_as_stored(native: Path) -> None:
    model = load(native, dtype=torch.float32)
    before = {name: layer.scales.clone() for name, layer in packed_layers(model).items()}
    model.to(torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert all(torch.equal(layer.scales, before[name]) for name, layer in packed_layers(model).items())
    assert distance(model, exact_logits(native)) < 3e-2


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(native: Path, device_map: object) -> None:
    model = load(native, dtype=torch.float32, device_map=device_map)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {model.device.type}
    assert distance(model.cpu(), exact_logits(native)) < 1e-6


def test_saving_writes_the_same_checkpoint_again(native: Path, dense: Path, tmp_path: Path) -> None:
    other = quantize_folder(dense, tmp_path / "w4", QuantScheme(4, 16))
    folder = mix(native, other, tmp_path / "mixed", "model.layers.0.mlp.down_proj")
    load(folder, dtype="auto").save_pretrained(tmp_path / "saved")
    assert raw_tensors(tmp_path / "saved") == raw_tensors(folder)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    with open_checkpoint(tmp_path / "saved") as saved, open_checkpoint(folder) as original:
        assert (saved.scheme, saved.overrides) == (original.scheme, original.overrides)
    assert distance(load(tmp_path / "saved", dtype=torch.float32), exact_logits(folder)) < 1e-6


def test_the_bare_model_loads_without_its_head(native: Path) -> None:
    model, info = AutoModel.from_pretrained(native, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and info["unexpected_keys"] == {"lm_head.weight"}
    assert len(packed_layers(model)) == 14
    with torch.no_grad():
        expected = load_dense_model(native).model(IDS).last_hidden_state
        assert torch.allclose(model(IDS).last_hidden_state, expected, atol=1e-5)


def edited(folder: Path, out: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint whose tensors were changed in place."""
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_missing_and_unexpected_tensors_are_reported(native: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)

    folder = edited(native, tmp_path / "edited", edit)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"model.norm.weight"}
    assert info["unexpected_keys"] == {"model.layers.9.mlp.up_proj.weight"}


def test_a_layer_stored_neither_packed_nor_dense_is_missing(native: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"

    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]

    folder = edited(native, tmp_path / "edited", edit)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {f"{name}.weight"}


def test_packed_tensors_of_another_shape_are_refused(native: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        key = "model.layers.0.mlp.up_proj.qweight"
        tensors[key] = tensors[key][:-1].contiguous()

    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj .*qweight has shape \[3, 128\]"):
        load(edited(native, tmp_path / "edited", edit))


def test_layers_of_another_size_than_the_configuration_are_refused(native: Path) -> None:
    config = AutoConfig.from_pretrained(native)
    config.intermediate_size = 256
    with pytest.raises(CheckpointError, match=r"is 64 x 128; config\.json describes 64 x 256"):
        AutoModelForCausalLM.from_pretrained(native, config=config)


def test_what_cannot_be_loaded_this_way_is_refused(native: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder or hub id"):
        LlamaForCausalLM.from_pretrained(
            None, config=AutoConfig.from_pretrained(native), state_dict=load_file(native / "model.safetensors")
        )
    folder = edited(native, tmp_path / "edited", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "other"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="'other'"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_that_stay_fused_are_refused_and_not_filled_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.setattr(transformers_quantizer, "unfuse_experts_", lambda model, **more: None)  # an unknown family
    around = "block_sparse_moe" if architecture == "mixtral" else "mlp"
    routers = dict.fromkeys(f"model.layers.{index}.{around}.gate" for index in (0, 1))
    dense = save_tiny_model(tmp_path / "model", architecture)
    folder = quantize_folder(dense, tmp_path / "q", QuantScheme(4, 32), schemes=routers)
    with pytest.raises(InputError, match=r"eqat generate, or make it dense first: eqat export .* --to dense"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_it_generates(native: Path) -> None:
    model = load(native, dtype=torch.float32)
    reference = load_dense_model(native)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False)
        expected = reference.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False)
    assert torch.equal(made, expected)
