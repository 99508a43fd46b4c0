"""Mixtures of experts in every format: under the names that the engines read, or refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.diagnosis.survey import Survey
from eqat_export.lint import get_engine
from eqat_export.lint.judge import judge
from eqat_export.verify import verify_checkpoint
from formats import QuantScheme, dequantize
from formats.checkpoint import CheckpointReader
from formats.errors import EqatError
from formats.model import open_checkpoint
from tests.tiny_checkpoints import quantize_folder

HELD = ("gptq", "gptq_v2", "bitblas", "compressed-tensors", "awq", "auto-round", "dense")
MARKERS = {"compressed-tensors": "weight_packed", "dense": "weight"}
ROUTERS = {
    "mixtral": [f"model.layers.{i}.block_sparse_moe.gate" for i in (0, 1)],
    "qwen3_moe": [f"model.layers.{i}.mlp.gate" for i in (0, 1)],
}
EXPERTS = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w2", "w3")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.fixture
def mixture(dense_models: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A native 4-bit checkpoint with its routers in full precision."""

    def make(architecture: str) -> Path:
        kept = dict.fromkeys(ROUTERS[architecture])
        return quantize_folder(dense_models(architecture), tmp_path / "native", QuantScheme(4, 32), schemes=kept)

    return make


@pytest.mark.parametrize("architecture", ROUTERS)
def test_experts_keep_the_names_of_the_models_own_files(mixture: Callable[[str], Path], architecture: str) -> None:
    source, (mixtures, parts) = mixture(architecture), EXPERTS[architecture]
    with open_checkpoint(source) as before:
        weights = {name: dequantize(before.layer(name)) for name in before.layer_names}
        assert len(weights) == 32
    for format_id in HELD:
        out = convert(source, source.with_name(format_id), format_id).out
        with CheckpointReader(out) as reader:
            for name in (f"model.layers.1.{mixtures}.{i}.{part}" for i in range(4) for part in parts):
                assert f"{name}.{MARKERS.get(format_id, 'qweight')}" in reader.tensors
            assert all(f"{router}.weight" in reader.tensors for router in ROUTERS[architecture])
        with open_checkpoint(out) as after:
            assert not [finding for finding in verify_checkpoint(after) if finding.severity != "note"], format_id
            for name in after.layer_names:
                assert torch.equal(after.stored_weight(name, after.layer(name)), weights[name])


@pytest.mark.parametrize("format_id", ["mlx", "gguf", "onnx"])
def test_a_format_without_experts_is_refused_by_name(mixture: Callable[[str], Path], format_id: str) -> None:
    if format_id != "mlx":
        pytest.importorskip(format_id)
    source = mixture("mixtral")
    out = source.with_name("out.gguf" if format_id == "gguf" else "out")
    with pytest.raises(EqatError, match=r"experts\.0\.w1: mlx-lm takes .* stacked|model_type 'mixtral'") as refused:
        convert(source, out, format_id)
    assert not out.exists() and "mlx" not in str(refused.value).partition("hold every layer:")[2]


@pytest.mark.parametrize(
    ("engine", "format_id", "architecture", "rules"),
    [
        ("transformers", "gptq_v2", "qwen3_moe", {"experts", "gptq-kept"}),
        ("transformers", "auto-round", "mixtral", {"experts"}),
        ("transformers", "compressed-tensors", "mixtral", {"ct-experts"}),
        ("transformers", "dense", "mixtral", set()),
        ("gptqmodel", "gptq_v2", "mixtral", {"mixtral"}),
        ("gptqmodel", "gptq_v2", "qwen3_moe", set()),
        ("vllm", "compressed-tensors", "qwen3_moe", set()),
    ],
)
def test_engines_are_judged(
    mixture: Callable[[str], Path], engine: str, format_id: str, architecture: str, rules: set[str]
) -> None:
    source = mixture(architecture)
    survey = Survey()
    with open_checkpoint(convert(source, source.with_name("out"), format_id).out) as checkpoint:
        findings = verify_checkpoint(checkpoint, survey=survey)
        verdict = judge(get_engine(engine), checkpoint, survey, findings)
    broken = {item.rule.id for item in verdict.broken if item.rule.effect in ("refused", "misread")}
    assert broken == rules


def test_experts_that_differ_are_refused_by_vllm_and_sglang(
    dense_models: Callable[[str], Path], tmp_path: Path
) -> None:
    others = {"model.layers.1.mlp.experts.2.up_proj": QuantScheme(8, 32), **dict.fromkeys(ROUTERS["qwen3_moe"])}
    source = quantize_folder(dense_models("qwen3_moe"), tmp_path / "native", QuantScheme(4, 32), schemes=others)
    survey = Survey()
    with open_checkpoint(convert(source, tmp_path / "out", "compressed-tensors").out) as checkpoint:
        findings = verify_checkpoint(checkpoint, survey=survey)
        for engine in ("vllm", "sglang"):
            broken = judge(get_engine(engine), checkpoint, survey, findings).broken
            assert "ct-experts" in {item.rule.id for item in broken}


def verify(folder: Path, runtime: str) -> tuple[int, dict[str, object]]:
    """``eqat verify --runtime`` in a process of its own: gptqmodel changes transformers' classes when it loads one."""
    words = [sys.executable, "-m", "eqat_export", "verify", str(folder), "--runtime", runtime, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "olmoe"])
def test_gptqmodel_computes_with_every_expert(
    dense_models: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("needs the extra gptq")
    kept = dict.fromkeys(f"model.layers.{i}.mlp.gate" for i in (0, 1))
    source = quantize_folder(dense_models(architecture), tmp_path / "native", QuantScheme(4, 32), schemes=kept)
    code, told = verify(convert(source, tmp_path / "v2", "gptq_v2").out, "gptqmodel")
    assert code == 0, told


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_dense_exports_run_in_transformers_fused_experts(
    mixture: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    code, told = verify(convert(mixture(architecture), tmp_path / "dense", "dense").out, "transformers")
    assert code == 0, told


def test_a_runtime_that_keeps_experts_together_is_told_apart(mixture: Callable[[str], Path], tmp_path: Path) -> None:
    if importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None:
        pytest.skip("needs the extra gptq")
    code, told = verify(convert(mixture("qwen3_moe"), tmp_path / "v2", "gptq_v2").out, "transformers")
    assert code == 1 and "in one parameter" in json.dumps(told)
