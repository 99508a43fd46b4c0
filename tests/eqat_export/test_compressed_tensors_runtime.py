"""compressed-tensors exports in transformers, whose reader is the compressed-tensors package."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.runtime_check import RuntimeResult, check_runtime
from eqat_export.runtimes import get_runtime
from formats import QuantScheme, dequantize, get_format, round_to_nearest
from formats.checkpoint import CheckpointWriter
from formats.errors import MissingExtraError
from formats.model import open_checkpoint
from formats.model_writer import write_layer, write_model_config
from tests.tiny_checkpoints import quantize_folder, rewrite

GOLDEN = Path(__file__).parent.parent / "formats" / "golden" / "compressed-tensors"

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs the extra compressed-tensors"
)


def proof(folder: Path) -> RuntimeResult:
    with open_checkpoint(folder) as checkpoint:
        return check_runtime(checkpoint, get_runtime("transformers"))


@needs_library
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extreme_zeros_run_in_transformers(native: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    convert(native(bits=bits, architecture="qwen2"), tmp_path / "out", "compressed-tensors")
    found = proof(tmp_path / "out")
    assert found.ok and found.dtype == "float16", found.lines()


@needs_library
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_scales_run_in_their_dtype(native: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    source = native(bits=3, scale_dtype=getattr(torch, dtype))
    convert(source, tmp_path / "out", "compressed-tensors", options={"scale_dtype": dtype})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    found = proof(tmp_path / "out")
    assert found.ok and found.dtype == dtype, found.lines()


@needs_library
@pytest.mark.parametrize("name", ["w2g64", "w3g128"])
def test_upstream_checkpoints_run_in_transformers(golden_root: Path, tmp_path: Path, name: str) -> None:
    convert(golden_root / name, tmp_path / "out", "compressed-tensors")
    found = proof(tmp_path / "out")
    assert found.ok, found.lines()


@needs_library
def test_one_group_a_row_and_symmetric_layers_run_in_transformers(dense_models: Callable, tmp_path: Path) -> None:
    def middle(layer):
        zeros = torch.full_like(layer.zeros, 8)
        return type(layer)(layer.codes, layer.scales, zeros, QuantScheme(4, -1, sym=True), layer.bias)

    native = quantize_folder(dense_models("llama"), tmp_path / "native", QuantScheme(4, -1), change=middle)
    rewrite(native, tmp_path / "out", "compressed-tensors")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.scheme == QuantScheme(4, -1, sym=True)
        assert not any(name.endswith("weight_zero_point") for name in checkpoint.reader.tensors)
    found = proof(tmp_path / "out")
    assert found.ok, found.lines()


@needs_library
def test_groups_that_differ_in_symmetry_are_refused_by_transformers() -> None:
    found = proof(GOLDEN / "mixed")  # the library's own folder
    assert not found.ok and "automatic conversion of the weights" in found.refusal


@needs_library
def test_layers_of_another_scheme_are_misread_by_transformers_and_noticed(
    native: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers 5.23 reads every layer by the first group, without a word."""
    down, form = "model.layers.1.mlp.down_proj", get_format("compressed-tensors")
    with open_checkpoint(native(bits=4)) as source, CheckpointWriter(tmp_path / "out") as writer:
        for name in source.passthrough_names:
            writer.add(name, source.get(name))
        for name in source.layer_names:
            layer = source.layer(name)
            write_layer(
                writer, form, name, round_to_nearest(dequantize(layer), QuantScheme(8, 32)) if name == down else layer
            )
        overrides = {down: QuantScheme(8, 32)}
        write_model_config(writer, source.reader.config, form, QuantScheme(4, 32), overrides=overrides)
        writer.copy_companions(source.reader.folder)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.overrides == overrides
    found = proof(tmp_path / "out")
    assert not found.refusal and list(found.wrong_layers) == [down]


def test_a_conversion_keeps_what_the_configuration_says_of_symmetry(
    native: Callable[..., Path], edited, tmp_path
) -> None:
    def middle(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.qzeros"].fill_(0x88888888 - 2**32)

    convert(edited(native(bits=4), middle), tmp_path / "out", "compressed-tensors")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert "model.layers.0.mlp.up_proj.weight_zero_point" in checkpoint.reader.tensors
        assert (checkpoint.layer("model.layers.0.mlp.up_proj").zeros == 8).all()


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"compressed_tensors.*pip install '.*\[compressed-tensors\]'"):
        get_runtime("transformers").check("compressed-tensors")
    with pytest.raises(MissingExtraError, match=r"pip install '.*\[gptq\]'"):
        get_runtime("transformers").check("gptq")


def test_the_librarys_own_checkpoint_converts_to_other_formats(tmp_path: Path) -> None:
    source = GOLDEN / "mixed"
    for target in ("native", "compressed-tensors"):
        convert(source, tmp_path / target, target)
        with open_checkpoint(source) as theirs, open_checkpoint(tmp_path / target) as ours:
            for name in theirs.layer_names:
                a, b = theirs.layer(name), ours.layer(name)
                assert torch.equal(a.codes, b.codes) and torch.equal(a.zeros, b.zeros), name
                assert torch.equal(a.scales, b.scales), name
            assert {name: theirs.layer_scheme(name) for name in theirs.layer_names} == {
                name: ours.layer_scheme(name) for name in ours.layer_names
            }
