"""A quantized output head in the real readers, and the rules on those that leave it at random."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from eqat_export.convert import convert
from eqat_export.diagnosis.survey import Survey
from eqat_export.lint import get_engine
from eqat_export.lint.judge import judge
from eqat_export.runtime_check import check_runtime
from eqat_export.runtimes import get_runtime
from eqat_export.verify import verify_checkpoint
from formats import QuantScheme
from formats.model import open_checkpoint
from tests.tiny_checkpoints import quantize_folder
from tests.tiny_models import save_tiny_model, tiny_config

READERS = [
    ("gptq", "gptqmodel", "gptqmodel"),
    ("awq", "gptqmodel", "gptqmodel"),
    ("compressed-tensors", "transformers", "compressed_tensors"),
    ("mlx", "mlx", "mlx_lm"),
    ("onnx", "onnxruntime", "onnxruntime"),
    ("auto-round", "auto-round", "auto_round"),
]


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every linear at 4 bits in groups of 32, the head too."""
    root = tmp_path_factory.mktemp("headed")
    config = tiny_config("llama")
    config.vocab_size = 320  # outputs that every layout packs
    model = save_tiny_model(root / "model", lambda: config)
    scheme = QuantScheme(4, 32)
    return quantize_folder(model, root / "native", scheme, schemes={"lm_head": scheme})


def runs_right(folder: Path, engine: str) -> bool:
    with open_checkpoint(folder) as checkpoint:
        return check_runtime(checkpoint, get_runtime(engine)).ok


def misread_by(folder: Path, engine: str) -> set[str]:
    survey = Survey()
    with open_checkpoint(folder) as checkpoint:
        findings = verify_checkpoint(checkpoint, survey=survey)
        broken = judge(get_engine(engine), checkpoint, survey, findings).broken
    return {item.rule.id for item in broken if item.rule.effect == "misread"}


@pytest.mark.parametrize(("form", "engine", "package"), READERS)
def test_readers_compute_with_it(headed: Path, tmp_path: Path, form: str, engine: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    out = convert(headed, tmp_path / "out", form).out
    assert runs_right(out, engine)
    if engine != "gptqmodel":
        return
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["lm_head"] is True  # vLLM and SGLang go by it


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_transformers_leaves_it_at_random_and_that_is_told_before(headed: Path, tmp_path: Path, form: str) -> None:
    pytest.importorskip("gptqmodel")
    out = convert(headed, tmp_path / "out", form).out
    assert misread_by(out, "transformers") == {"head"}
    assert not runs_right(out, "transformers")
    routed = convert(headed, tmp_path / "routed", "compressed-tensors").out
    assert not misread_by(routed, "transformers")
