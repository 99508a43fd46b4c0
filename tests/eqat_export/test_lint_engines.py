"""Rules against the engines themselves, where these run on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eqat_export.convert import convert
from eqat_export.diagnosis.survey import Survey
from eqat_export.lint import get_engine
from eqat_export.lint.judge import judge
from eqat_export.runtime_check import check_runtime
from eqat_export.runtimes import get_runtime
from eqat_export.verify import verify_checkpoint
from formats.affine import dequantize
from formats.model import open_checkpoint
from formats.packing import pack_bits, unpack_bits

Make = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj"


def effects(folder: Path, engine: str) -> dict[str, str]:
    survey = Survey()
    with open_checkpoint(folder) as checkpoint:
        findings = verify_checkpoint(checkpoint, survey=survey)
        return {
            item.rule.id: item.rule.effect for item in judge(get_engine(engine), checkpoint, survey, findings).broken
        }


@pytest.fixture(scope="module")
def mlx() -> Callable[[Path], object]:
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    return lambda folder: utils.load_model(folder)[0]


@pytest.fixture(scope="module")
def gptqmodel() -> Callable[[Path], object]:
    library = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    return lambda folder: library.GPTQModel.load(
        str(folder), device="cpu", backend=library.BACKEND.GPTQ_TORCH, dtype=torch.float16
    )


def drop_order(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("g_idx")]:
        del tensors[name]


def test_mlx_refuses_gptq_with_g_idx(native: Make, mlx: Callable) -> None:
    folder = native(bits=4, format_id="gptq_v2")
    assert effects(folder, "mlx")["gptq-order"] == "refused"
    with pytest.raises(ValueError, match="g_idx"):
        mlx(folder)


def test_mlx_refuses_gptq_at_other_bits(native: Make, edited: Make, mlx: Callable) -> None:
    folder = edited(native(bits=2, format_id="gptq_v2"), drop_order)
    assert effects(folder, "mlx")["gptq-bits"] == "refused"
    with pytest.raises(ValueError, match="bits"):
        mlx(folder)


def test_mlx_unpacks_gptq_as_awq_and_finds_no_bits(native: Make, edited: Make, mlx: Callable) -> None:
    folder = edited(native(bits=4, format_id="gptq_v2"), drop_order)
    assert effects(folder, "mlx") == {"gptq-as-awq": "refused"}
    with pytest.raises(ValueError, match="number of bits 0"):
        mlx(folder)


def test_mlx_finds_no_weights_in_our_own_layout(native: Make, mlx: Callable) -> None:
    folder = native(bits=4)
    assert effects(folder, "mlx") == {"own-layout": "refused"}
    with pytest.raises(ValueError, match=r"not in model|Missing"):
        mlx(folder)


def test_mlx_reads_dense_exports(native: Make, tmp_path: Path, mlx: Callable) -> None:
    convert(native(bits=4), tmp_path / "dense", "dense")
    assert effects(tmp_path / "dense", "mlx") == {}
    mlx(tmp_path / "dense")


@pytest.mark.parametrize("configured", [True, False])
def test_transformers_fills_our_own_layout_at_random(native: Make, edited: Make, configured: bool) -> None:
    folder = edited(native(bits=4), lambda tensors: None)
    if not configured:
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
    assert effects(folder, "transformers") == {"own-layout": "misread"}
    script = (  # a process of its own: where eqat_train is imported, transformers reads them
        "import sys; from safetensors.torch import save_file; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "save_file({'weight': model.get_submodule(sys.argv[2]).weight.detach().float()}, sys.argv[3])"
    )
    filled = folder.with_name(f"{folder.name}.safetensors")
    subprocess.run([sys.executable, "-c", script, str(folder), UP, str(filled)], check=True, capture_output=True)
    with open_checkpoint(folder) as checkpoint:
        exact = dequantize(checkpoint.layer(UP))
    found = load_file(filled)["weight"]
    assert float((found - exact).norm() / exact.norm()) > 0.5


def test_transformers_refuses_mlx_configurations(dense_models: Callable[[str], Path], edited: Make) -> None:
    """MLX's configuration has no quant_method, and transformers wants one."""
    transformers = pytest.importorskip("transformers")
    folder = edited(dense_models("llama"), lambda tensors: None)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"bits": 4, "group_size": 64, "mode": "affine"}}
    path.write_text(json.dumps(config))
    with pytest.raises((ValueError, KeyError, AttributeError), match="quant_method"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_gptqmodel_refuses_v1_of_unknown_producers(native: Make, gptqmodel: Callable) -> None:
    folder = native(bits=2, format_id="gptq")
    for name in ("config.json", "quantize_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("gptqmodel:0.9.0", "gptqmodel:0.8.0"))
    assert effects(folder, "gptqmodel")["v1-producer"] == "refused"
    with pytest.raises(ValueError, match="sym=False"):
        gptqmodel(folder)


def test_gptqmodel_refuses_a_model_without_tokenizer(native: Make, gptqmodel: Callable) -> None:
    folder = native(bits=2, format_id="gptq_v2")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert effects(folder, "gptqmodel") == {"tokenizer": "refused"}
    with pytest.raises((OSError, ValueError, TypeError), match=r"(?i)tokenizer"):
        gptqmodel(folder)


def runs_right(folder: Path, runtime: str) -> bool:
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    pytest.importorskip("optimum", reason="optimum is not installed")
    with open_checkpoint(folder) as checkpoint:
        return check_runtime(checkpoint, get_runtime(runtime)).ok


@pytest.mark.parametrize("bits", [2, 4])
def test_zeros_wrapped_field_by_field_are_misread_by_whole_words(native: Make, edited: Make, bits: int) -> None:
    folder = native(bits=bits, format_id="gptq")
    assert "misread" not in effects(folder, "transformers").values()
    assert runs_right(folder, "transformers")

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{UP}.qzeros"
        fields = unpack_bits(tensors[name], bits, tensors[name].shape[1] * 32 // bits, axis=1)
        fields[0, 1::4] = 2**bits - 1
        tensors[name] = pack_bits(fields, bits, axis=1)

    wrapped = edited(folder, wrap)
    for name in ("config.json", "quantize_config.json"):  # as of a producer that wraps field by field
        path = wrapped / name
        value = json.loads(path.read_text())
        (value["quantization_config"] if name == "config.json" else value)["meta"]["quantizer"] = ["other:1.0"]
        path.write_text(json.dumps(value))
    assert effects(wrapped, "transformers")["gptq-wrap"] == "misread"
    assert not runs_right(wrapped, "transformers")


def test_transformers_misreads_linears_kept_in_full_precision(native: Make, edited: Make) -> None:
    def unquantize(tensors: dict[str, torch.Tensor]) -> None:
        for local in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{UP}.{local}"]
        tensors[f"{UP}.weight"] = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)) * 0.1

    folder = edited(native(bits=4, format_id="gptq_v2"), unquantize)
    for name in ("config.json", "quantize_config.json"):
        path = folder / name
        if path.exists():
            value = json.loads(path.read_text())
            (value["quantization_config"] if name == "config.json" else value)["dynamic"] = {f"-:^{UP}$": {}}
            path.write_text(json.dumps(value))
    assert effects(folder, "transformers")["gptq-kept"] == "misread"
    assert not runs_right(folder, "transformers")
    assert "gptq-kept" not in effects(folder, "gptqmodel")
    assert runs_right(folder, "gptqmodel")
