"""Skeletons, filling them, finding the blocks, and whole dequantized models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from eqat_train.models.decoder import find_decoder_layers
from eqat_train.models.loading import build_skeleton, load_dense_model, load_parameters_, load_tokenizer, unload_
from formats import QuantScheme, dequantize, get_format, round_to_nearest
from formats.checkpoint import CheckpointReader, CheckpointWriter
from formats.errors import CheckpointError, InputError
from formats.model import open_checkpoint
from formats.model_writer import write_layer, write_model_config
from tests.tiny_models import ARCHITECTURES, save_tiny_model, tiny_tokens


def _edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Adds or replaces tensors (None removes one) of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dense_model_computes_what_transformers_own_loader_computes(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", architecture, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_dense_model(folder)
    tokens = tiny_tokens(2)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert not ours.training
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    model = load_dense_model(save_tiny_model(tmp_path / "model", "qwen3"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_quantized_checkpoint_loads_dequantized(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", "qwen2")
    name, scheme, fmt = "model.layers.1.mlp.down_proj", QuantScheme(3, 32), get_format("native")
    with CheckpointReader(source) as reader, CheckpointWriter(tmp_path / "quantized") as writer:
        layer = round_to_nearest(reader.get(f"{name}.weight"), scheme)
        for other in reader.tensors:
            if other != f"{name}.weight":
                writer.add(other, reader.get(other))
        write_layer(writer, fmt, name, layer)
        write_model_config(writer, reader.config, fmt, scheme)
    with open_checkpoint(tmp_path / "quantized") as checkpoint:
        model = load_dense_model(checkpoint)
    assert torch.equal(model.get_submodule(name).weight, dequantize(layer))
    assert torch.equal(load_dense_model(tmp_path / "quantized").get_submodule(name).weight, dequantize(layer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"tensor model\.norm\.weight is missing for a LlamaForCausalLM"),
        ({"model.norm.weight": None, "lm_head.weight": None}, r"lm_head\.weight and 1 more is missing"),
        ({"model.extra": torch.zeros(2)}, r"unexpected tensor model\.extra"),
        ({"model.norm.weight": torch.zeros(3)}, r"model\.norm\.weight has shape \[3\]; config\.json describes \[64\]"),
    ],
)
def test_tensors_that_do_not_fit_the_architecture_are_named(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    _edit_weights(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_dense_model(folder)


def test_the_rotary_buffers_of_old_checkpoints_are_no_error(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    _edit_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    load_dense_model(folder)


def test_a_skeleton_holds_no_parameter_but_real_buffers(tmp_path: Path) -> None:
    skeleton = build_skeleton(save_tiny_model(tmp_path / "model", "gemma2"), torch.float32)
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in skeleton.parameters())
    buffers = dict(skeleton.named_buffers())
    assert buffers and not any(buffer.is_meta for buffer in buffers.values())


def test_a_module_is_filled_and_emptied_without_losing_its_own_buffers() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("stored", torch.tensor(1.0))
            self.register_buffer("computed", torch.tensor(2.0), persistent=False)

    class Source:
        def get(self, name: str) -> torch.Tensor:
            return state[name]

    module = Own()
    state = {f"a.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    unload_(module)
    assert module.stored.is_meta and module.linear.weight.is_meta and module.computed == 2
    load_parameters_(module, "a", Source(), "cpu", torch.float64)
    assert torch.equal(module.linear.weight, state["a.linear.weight"].double()) and module.stored == 1
    assert module.linear.weight.dtype == torch.float64
    module.linear.weight.zero_()
    assert state["a.linear.weight"].any(), "the source's tensor was written to"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_blocks_of_every_architecture_are_found(architecture: str, tmp_path: Path) -> None:
    path, layers = find_decoder_layers(build_skeleton(save_tiny_model(tmp_path / "model", architecture), torch.float32))
    assert path == "model.layers" and len(layers) == 2


def test_the_list_with_most_parameters_is_the_decoder() -> None:
    model = nn.ModuleDict(
        {
            "norms": nn.ModuleList(nn.LayerNorm(512) for _ in range(9)),
            "adapters": nn.ModuleList(nn.Linear(2, 2) for _ in range(3)),
            "blocks": nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))}) for _ in range(2)
            ),
        }
    )
    assert find_decoder_layers(model)[0] == "blocks"


def test_a_model_without_one_clear_list_of_blocks_is_refused() -> None:
    with pytest.raises(InputError, match=r"has no torch\.nn\.ModuleList of blocks"):
        find_decoder_layers(nn.Sequential(nn.Linear(2, 2)))
    twins = nn.ModuleDict({name: nn.ModuleList([nn.Linear(2, 2)]) for name in ("encoder", "decoder")})
    with pytest.raises(InputError, match=r"encoder \(1 items\), decoder \(1 items\)"):
        find_decoder_layers(twins)


def test_the_tokenizer_goes_around(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tiny_model(tmp_path / "model"))
    text = "Once upon a time, naïvely…"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_unknown_architectures_and_missing_tokenizers_get_one_line(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="has no tokenizer files") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(InputError, match="cannot load the configuration") as caught:
        build_skeleton(folder, torch.float32)
    assert "\n" not in str(caught.value)


def test_code_in_a_model_folder_runs_only_when_trusted(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    (folder / "own.py").write_text("raise RuntimeError('the code ran')\n")
    with pytest.raises(InputError, match=r"needs Python code of its own.*--trust-remote-code"):
        build_skeleton(folder, torch.float32)
