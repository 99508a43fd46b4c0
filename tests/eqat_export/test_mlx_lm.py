"""MLX exports in mlx-lm, and mlx-lm's own files in every other format, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("mlx_lm", reason="needs the extra mlx")

import mlx_lm

from eqat_export.compare import compare_checkpoints
from eqat_export.convert import convert
from eqat_export.runtime_check import check_runtime
from eqat_export.runtimes import get_runtime
from eqat_export.runtimes.reference import token_ids
from eqat_export.verify import verify_checkpoint
from formats import available_formats, dequantize
from formats.model import open_checkpoint
from tests.tiny_checkpoints import leave_out, mix

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "olmo2", "smollm3"]


def proof(folder: Path, ids: torch.Tensor | None = None) -> tuple[bool, list[str]]:
    with open_checkpoint(folder) as checkpoint:
        result = check_runtime(checkpoint, get_runtime("mlx"), ids)
    return result.ok, result.lines()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_exports_run_in_mlx_lm(native: Callable[..., Path], tmp_path: Path, bits: int, dtype: str) -> None:
    convert(native(bits=bits), tmp_path / "mlx", "mlx", options={"scale_dtype": dtype})
    ok, said = proof(tmp_path / "mlx")
    assert ok, said


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_runs_in_mlx_lm(native: Callable[..., Path], tmp_path: Path, architecture: str) -> None:
    convert(native(bits=3, architecture=architecture), tmp_path / "mlx", "mlx")
    ids = token_ids(257, length=8)  # within the tiny sliding windows, which mlx-lm leaves out of Mistral and Gemma 2
    ok, said = proof(tmp_path / "mlx", ids)
    assert ok, said


def test_it_generates(native: Callable[..., Path], tmp_path: Path) -> None:
    convert(native(bits=2, architecture="qwen3"), tmp_path / "mlx", "mlx")
    model, tokenizer = mlx_lm.load(str(tmp_path / "mlx"))
    text = mlx_lm.generate(model, tokenizer, prompt="abc", max_tokens=8)
    assert isinstance(text, str)


def test_layers_of_their_own_scheme_and_full_precision_ones_run(
    eqat: Callable, native: Callable[..., Path], tmp_path: Path
) -> None:
    up = "model.layers.1.mlp.up_proj"
    mixed = mix(native(bits=2), native("other", bits=4, group_size=64), tmp_path / "mixed", up)
    outcome = eqat("export", mixed, "--to", "mlx", "--scale-dtype", "float32", "--out", tmp_path / "mlx")
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"][up] == {"group_size": 64, "bits": 4, "mode": "affine"}
    outcome = eqat("verify", tmp_path / "mlx", "--against", mixed, "--runtime", "mlx", "--json")
    assert outcome.code == 0, outcome.err + outcome.out
    assert json.loads(outcome.out)["runtime"]["ok"] is True


def test_a_moved_bias_is_found(native: Callable[..., Path], tmp_path: Path) -> None:
    """The runtime check compares with the file, so a file that says something else has to differ from its source."""
    source = native(bits=3)
    convert(source, tmp_path / "mlx", "mlx")
    shard = tmp_path / "mlx" / "model.safetensors"
    tensors = load_file(shard)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.biases"][6, 0] += tensors[f"{name}.scales"][6, 0]
    save_file(tensors, shard)
    with open_checkpoint(tmp_path / "mlx") as checkpoint, open_checkpoint(source) as truth:
        found = {row.name: row for row in compare_checkpoints(checkpoint, truth).rows}
    assert not found[name].ok
    assert found[name].error > 0
    assert all(row.ok for row in found.values() if row.name != name)


class TestTheirFiles:
    """What mlx_lm.convert writes: quantized embeddings and heads, biases that are rounded edges."""

    @pytest.fixture
    def theirs(self, dense_models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
        def make(bits: int, dtype: str, architecture: str = "llama") -> Path:
            out = tmp_path / "theirs"
            source = str(dense_models(architecture))
            mlx_lm.convert(source, str(out), quantize=True, q_bits=bits, q_group_size=32, dtype=dtype)
            return out

        return make

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_they_run_as_we_read_them(self, theirs, bits, dtype) -> None:
        ok, said = proof(theirs(bits, dtype))
        assert ok, said

    @pytest.mark.parametrize("architecture", ["llama", "qwen3"])
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_they_become_native_with_the_loss_measured(self, theirs, tmp_path, bits, architecture) -> None:
        source = theirs(bits, "bfloat16", architecture)
        done = convert(source, tmp_path / "native", "native")
        assert not done.rounded.tensors or done.rounded.where == "model.embed_tokens"
        with open_checkpoint(source) as before, open_checkpoint(tmp_path / "native") as after:
            assert set(before.layer_names) - set(after.layer_names) == {"model.embed_tokens"}
            largest = 0.0
            for name in after.layer_names:
                old, new = before.layer(name), after.layer(name)
                assert torch.equal(old.codes, new.codes)
                largest = max(largest, float((before.stored_weight(name, old) - dequantize(new)).abs().max()))
            embedding = before.stored_weight("model.embed_tokens", before.layer("model.embed_tokens"))
            largest = max(largest, float((embedding - dequantize(before.layer("model.embed_tokens"))).abs().max()))
            stored = after.get("model.embed_tokens.weight")
            assert stored.dtype == torch.bfloat16
            assert float((stored.float() - embedding).abs().max()) <= largest + 2.0**-8 * float(embedding.abs().max())
        assert done.read.error == largest
        assert (largest == 0) is (bits == 2)

    def test_they_go_through_gptq_and_back(self, theirs, tmp_path, eqat) -> None:
        source = theirs(4, "float16", "qwen3")
        assert eqat("export", source, "--to", "gptq_v2", "--out", tmp_path / "v2").code == 0
        assert eqat("export", tmp_path / "v2", "--to", "mlx", "--out", tmp_path / "again").code == 0
        ok, said = proof(tmp_path / "again")
        assert ok, said


def test_a_linear_in_full_precision_stays_so(native: Callable[..., Path], tmp_path: Path) -> None:
    part = leave_out(native(bits=4), tmp_path / "part", "model.layers.0.mlp.down_proj")
    convert(part, tmp_path / "out", "mlx")
    ok, said = proof(tmp_path / "out")
    assert ok, said
    with open_checkpoint(tmp_path / "out") as checkpoint:
        findings = verify_checkpoint(checkpoint)
    assert not [finding for finding in findings if finding.severity != "note"], findings


@pytest.mark.parametrize("target", [name for name in available_formats() if name != "mlx"])
def test_what_mlx_lm_made_goes_to_every_format_that_holds_it(
    dense_models: Callable[[str], Path], tmp_path: Path, eqat: Callable, target: str
) -> None:
    pytest.importorskip({"onnx": "onnx", "gguf": "gguf"}.get(target, "torch"), reason=f"needs the extra {target}")
    theirs = tmp_path / "theirs"
    mlx_lm.convert(str(dense_models("qwen3")), str(theirs), quantize=True, q_bits=4, q_group_size=32, dtype="float16")
    out = tmp_path / ("out.gguf" if target == "gguf" else "out")
    convert(theirs, out, target)
    outcome = eqat("verify", out, "--against", theirs)
    assert outcome.code == 0, outcome.out + outcome.err
