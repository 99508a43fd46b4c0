"""A checkpoint as a packed model: the same numbers as dequantized, nothing unpacked, and back to disk unchanged."""

from pathlib import Path

import pytest
import torch
from torch import nn

from eqat_train.e2e_qp.packed_model import PackedModel, load_packed_model, write_trained
from eqat_train.models.loading import load_dense_model
from formats import QuantScheme
from formats.checkpoint import CheckpointReader, CheckpointWriter
from formats.errors import CheckpointError, InputError
from formats.model import open_checkpoint
from tests.tiny_checkpoints import act_order_layer, quantize_folder, raw_tensors, rewrite
from tests.tiny_models import ARCHITECTURES, save_tiny_model, tiny_tokens

W2G32 = QuantScheme(2, 32)


def load(folder: Path, scale_dtype: torch.dtype = torch.float16) -> PackedModel:
    with open_checkpoint(folder) as checkpoint:
        return load_packed_model(checkpoint, scale_dtype=scale_dtype)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tiny_tokens(2), use_cache=False).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_the_dequantized_model_bit_for_bit(tmp_path: Path, architecture: str) -> None:
    source = save_tiny_model(tmp_path / "fp", architecture, dtype=torch.bfloat16)
    folder = quantize_folder(source, tmp_path / "q", W2G32)
    packed = load(folder)
    assert torch.equal(logits(packed.model), logits(load_dense_model(folder)))
    trainable = {name for name, parameter in packed.model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.scales" for name in packed.linears}
    assert not any(type(module) is nn.Linear for module in packed.layers.modules())


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_was_trained_is_what_ships(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    folder = quantize_folder(save_tiny_model(tmp_path / "fp", "qwen2"), tmp_path / "q", QuantScheme(3, 64))
    with open_checkpoint(folder) as checkpoint, CheckpointWriter(tmp_path / "out") as writer:
        packed = load_packed_model(checkpoint, scale_dtype=scale_dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for scales in packed.scales:
                scales.mul_(1 + 0.05 * torch.randn(scales.shape, generator=generator))
        write_trained(writer, checkpoint, packed.linears)
    trained = logits(packed.model)
    assert torch.equal(trained, logits(load(tmp_path / "out", scale_dtype).model))
    assert torch.equal(trained, logits(load_dense_model(tmp_path / "out")))
    assert not torch.equal(trained, logits(load_dense_model(folder)))


@pytest.mark.parametrize("format_id", ["native", "gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_writing_untrained_scales_gives_the_native_checkpoint_back(tmp_path: Path, format_id: str, bits: int) -> None:
    fp = save_tiny_model(tmp_path / "fp", "qwen2", dtype=torch.bfloat16)
    native = quantize_folder(fp, tmp_path / "native", QuantScheme(bits, 32))
    start = native if format_id == "native" else rewrite(native, tmp_path / "start", format_id)
    with open_checkpoint(start) as checkpoint, CheckpointWriter(tmp_path / "out") as writer:
        write_trained(writer, checkpoint, load_packed_model(checkpoint).linears)
    expected = raw_tensors(rewrite(start, tmp_path / "expected", "native"))
    assert raw_tensors(tmp_path / "out") == expected
    with CheckpointReader(tmp_path / "out") as out:
        told = {key: out.quantization_config[key] for key in ("checkpoint_format", "bits", "group_size")}
        assert told == {"checkpoint_format": "native", "bits": bits, "group_size": 32}


def test_act_order_survives(tmp_path: Path) -> None:
    fp = save_tiny_model(tmp_path / "fp")
    native = quantize_folder(fp, tmp_path / "native", W2G32, change=act_order_layer)
    start = rewrite(native, tmp_path / "gptq", "gptq_v2")
    packed = load(start)
    assert all(linear.g_idx is not None for linear in packed.linears.values())
    assert torch.equal(logits(packed.model), logits(load_dense_model(start)))
    with open_checkpoint(start) as checkpoint, CheckpointWriter(tmp_path / "out") as writer:
        write_trained(writer, checkpoint, packed.linears)
    assert raw_tensors(tmp_path / "out") == raw_tensors(native)


def test_a_full_precision_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="full precision"):
        load(save_tiny_model(tmp_path / "fp"))


def test_layers_that_contradict_the_configuration_are_named(tmp_path: Path) -> None:
    folder = quantize_folder(save_tiny_model(tmp_path / "fp"), tmp_path / "q", W2G32)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj is .* config.json describes"):
        load(folder)
