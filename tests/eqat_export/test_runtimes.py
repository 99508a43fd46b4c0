"""Exports in the real libraries, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.runtime_check import check_runtime, probe_columns
from eqat_export.runtimes import get_runtime
from eqat_export.runtimes.base import ModuleSession, Runtime, Session
from formats import QuantizedLinear, QuantScheme, dequantize, history
from formats.errors import CheckpointError, InputError, MissingExtraError
from formats.model import Checkpoint, open_checkpoint

UP = "model.layers.1.mlp.up_proj"

needs_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
    reason="needs the extra gptq",
)


def proof(folder: Path, runtime: str) -> dict[str, object]:
    with open_checkpoint(folder) as checkpoint:
        result = check_runtime(checkpoint, get_runtime(runtime))
    return {"weights": result.weights_ok, "logits": result.logits_ok, "said": result.lines()}


@needs_gptqmodel
@pytest.mark.parametrize("name", ["w2g64", "w3g128"])
def test_upstream_checkpoints_as_gptq_v2_run_in_gptqmodel(golden_root: Path, tmp_path: Path, name: str) -> None:
    convert(golden_root / name, tmp_path / "v2", "gptq_v2")
    found = proof(tmp_path / "v2", "gptqmodel")
    assert found["weights"] and found["logits"], found["said"]


@needs_gptqmodel
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_v1_with_extreme_zeros_runs_in_gptqmodel(native: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    convert(native(bits=bits), tmp_path / "v1", "gptq")
    found = proof(tmp_path / "v1", "gptqmodel")
    assert found["weights"] and found["logits"], found["said"]


@needs_gptqmodel
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_v1_with_extreme_zeros_runs_in_transformers(
    native: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    convert(native(bits=bits, architecture="qwen2"), tmp_path / "v1", "gptq")
    found = proof(tmp_path / "v1", "transformers")
    assert found["weights"] and found["logits"], found["said"]


def test_dense_exports_run_in_transformers(eqat: Callable, native: Callable[..., Path], tmp_path: Path) -> None:
    convert(native(architecture="qwen3"), tmp_path / "dense", "dense", options={"dtype": "float16"})
    outcome = eqat("verify", tmp_path / "dense", "--runtime", "transformers", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["runtime"]["ok"] is True


class Misreading(Runtime):
    """A reader that gets something wrong: it loads a damaged copy, densely, in place of the checkpoint."""

    id = "misreading"
    package = "torch"
    requires = ()
    extra = ""
    formats = ("native",)

    def __init__(self, damaged: Path) -> None:
        self.damaged = damaged

    def load(self, checkpoint: Checkpoint, device: torch.device) -> ModuleSession:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        dense = self.damaged.with_name("misread")
        convert(self.damaged, dense, "dense", options={"dtype": "float16"}, force=True)
        return ModuleSession(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float16).eval())


def one_zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.qzeros"][0, 0] ^= 1


def every_zero_of_a_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.qzeros"] ^= 0x11111111


def test_a_reader_that_is_right_passes(native: Callable[..., Path]) -> None:
    folder = native(bits=4)
    with open_checkpoint(folder) as checkpoint:
        result = check_runtime(checkpoint, Misreading(folder))
    assert result.ok
    assert result.weights == sum(
        rows * columns for rows, columns in map(checkpoint.layer_features, checkpoint.layer_names)
    )


def test_one_zero_off_by_one_fails(native: Callable[..., Path], edited: Callable[..., Path]) -> None:
    folder = native(bits=4)
    with open_checkpoint(folder) as checkpoint:
        result = check_runtime(checkpoint, Misreading(edited(folder, one_zero)))
    assert not result.ok
    assert result.wrong_layers == {UP: 32}


def test_a_layer_of_wrong_zeros_fails_by_its_logits_too(
    native: Callable[..., Path], edited: Callable[..., Path]
) -> None:
    folder = native(bits=4)
    with open_checkpoint(folder) as checkpoint:
        result = check_runtime(checkpoint, Misreading(edited(folder, every_zero_of_a_layer)))
    assert not result.logits_ok
    assert list(result.wrong_layers) == [UP]


class LayersOnly(Runtime):
    """A runtime of single layers, computed here in float64 and off by ``relative``."""

    id, package, requires, extra, formats = "layers", "torch", (), "", ("native",)

    def __init__(self, relative: float = 0.0) -> None:
        self.relative = relative

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        relative = self.relative

        class Layers(Session):
            def layer(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
                weight = dequantize(checkpoint.layer(name)).half().double()

                def run(inputs: torch.Tensor) -> torch.Tensor:
                    # unit vectors pass unharmed: only sums of several products are off
                    several = (inputs != 0).sum(dim=1, keepdim=True) > 1
                    return (inputs.double() @ weight.T * (1 + relative * several)).half()

                return run

        return Layers()


def test_a_runtime_of_layers_is_judged_by_weights_and_by_outputs(native: Callable[..., Path]) -> None:
    with open_checkpoint(native(bits=3)) as checkpoint:
        right = check_runtime(checkpoint, LayersOnly())
        off = check_runtime(checkpoint, LayersOnly(relative=2e-3))
    assert right.ok and right.weights_ok and right.output_ratio <= 1.01
    assert off.weights_ok and not off.logits_ok and not off.ok
    assert "random inputs" in " ".join(off.lines())


def test_logits_that_are_not_finite_fail(native: Callable[..., Path]) -> None:
    class Overflowing(Misreading):
        def load(self, checkpoint: Checkpoint, device: torch.device) -> ModuleSession:
            session = super().load(checkpoint, device)
            session.model.model.norm.weight.data[0] = float("nan")
            return session

    folder = native(bits=4)
    with open_checkpoint(folder) as checkpoint:
        result = check_runtime(checkpoint, Overflowing(folder))
    assert result.weights_ok and not result.logits_ok


@needs_gptqmodel
def test_a_folder_that_the_library_refuses_is_a_failed_verification(
    eqat: Callable, native: Callable[..., Path], tmp_path: Path
) -> None:
    convert(native(bits=2), tmp_path / "v1", "gptq")
    for name in ("config.json", "quantize_config.json"):
        path = tmp_path / "v1" / name
        path.write_text(path.read_text().replace("gptqmodel:0.9.0", "somebody:1.0"))
    outcome = eqat("verify", tmp_path / "v1", "--runtime", "gptqmodel")
    assert outcome.code == 1
    assert "does not load it" in outcome.out


@pytest.mark.parametrize(
    ("runtime", "message"),
    [("gptqmodel", "it reads gptq, gptq_v2"), ("transformers", "it reads gptq, gptq_v2, "), ("vllm", "known are")],
)
def test_a_runtime_that_does_not_read_the_format_says_what_it_reads(
    eqat: Callable, native: Callable[..., Path], runtime: str, message: str
) -> None:
    outcome = eqat("verify", native(), "--runtime", runtime)
    assert outcome.code == 2
    assert message in outcome.err and len(outcome.err.splitlines()) == 1


def test_among_the_last_exports_a_runtime_skips_what_it_does_not_read(
    eqat: Callable, native: Callable[..., Path]
) -> None:
    history.record("native", native())
    assert eqat("export", "--to", "gptq").code == eqat("export", "--to", "dense").code == 0
    v1, dense = history.last_exports()
    assert eqat("verify", dense, "--runtime", "gptqmodel").code == 2
    shutil.rmtree(v1)
    outcome = eqat("verify", "--runtime", "gptqmodel")
    assert outcome.code == 0
    assert "gptqmodel: does not read dense, so it was not run" in outcome.out


def test_a_missing_extra_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install '.*\[gptq\]'"):
        get_runtime("gptqmodel").check("gptq")
    get_runtime("transformers").check(None)
    with pytest.raises(InputError):
        get_runtime("gptqmodel").check("native")


def test_tensors_that_contradict_the_configuration_are_named(native: Callable[..., Path], edited: Callable) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    folder = edited(native(), drop)
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=r"missing.*model\.norm\.weight"):
        check_runtime(checkpoint, Misreading(folder))


def test_large_layers_are_probed_in_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    g_idx = torch.randperm(128, generator=torch.Generator().manual_seed(0)).int() // 32
    layer = QuantizedLinear(
        torch.zeros(8, 128, dtype=torch.uint8),
        torch.ones(8, 4),
        torch.zeros(8, 4, dtype=torch.int32),
        QuantScheme(4, 32, desc_act=True),
        g_idx=g_idx,
    )
    assert torch.equal(probe_columns(layer), torch.arange(128))
    monkeypatch.setattr("eqat_export.runtime_check.FULL_PROBE", 0)
    assert g_idx[probe_columns(layer)].tolist() == [0, 1, 2, 3]


@needs_gptqmodel
@pytest.mark.parametrize(
    ("architecture", "format_id"), [("qwen2", "gptq_v2"), ("qwen3", "gptq"), ("phi3", "gptq"), ("gemma2", "gptq_v2")]
)
def test_biases_tied_embeddings_and_fused_projections_run_in_gptqmodel(
    native: Callable[..., Path], tmp_path: Path, architecture: str, format_id: str
) -> None:
    convert(native(architecture=architecture, bits=4), tmp_path / "out", format_id)
    found = proof(tmp_path / "out", "gptqmodel")
    assert found["weights"] and found["logits"], found["said"]
