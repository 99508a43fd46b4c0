"""ONNX exports in onnxruntime itself, and in onnxruntime-genai where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.runtime_check import RuntimeResult, check_runtime
from eqat_export.runtimes import get_runtime
from eqat_export.runtimes.base import Session
from eqat_export.runtimes.reference import reference_model, token_ids
from formats.model import Checkpoint, open_checkpoint

MakeCheckpoint = Callable[..., Path]
FAMILIES = ["llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"]
UP = "model.layers.1.mlp.up_proj"
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None,
    reason="needs the extra onnx",
)


def export(source: Path, out: Path, **options: str) -> Path:
    convert(source, out, "onnx", options=options)
    return out


def proof(folder: Path) -> RuntimeResult:
    with open_checkpoint(folder) as checkpoint:
        return check_runtime(checkpoint, get_runtime("onnxruntime"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_family_runs_with_our_weights(native: MakeCheckpoint, tmp_path: Path, family: str, bits: int) -> None:
    options = {"container_bits": "4"} if bits == 3 else {}
    source = native(architecture=family, bits=bits, scale_dtype=torch.float32)
    found = proof(export(source, tmp_path / "out", **options))
    assert found.ok, found.lines()
    assert found.dtype == "float32"
    assert (found.layers, found.weights) == (8 if family == "phi3" else 14, 73728)


@pytest.mark.parametrize(("family", "bits"), [("qwen2", 2), ("qwen2", 4), ("qwen3", 8), ("mistral", 4)])
def test_half_precision_graphs_run_with_our_weights(
    native: MakeCheckpoint, tmp_path: Path, family: str, bits: int
) -> None:
    found = proof(export(native(architecture=family, bits=bits), tmp_path / "out", scale_dtype="float16"))
    assert found.ok, found.lines()
    assert found.dtype == "float16"


@pytest.mark.parametrize("group_size", [16, 48, 64, -1])
def test_groups_that_become_several_blocks_run_with_our_weights(
    native: MakeCheckpoint, tmp_path: Path, group_size: int
) -> None:
    found = proof(export(native(bits=2, group_size=group_size), tmp_path / "out"))
    assert found.ok, found.lines()


@pytest.mark.parametrize("case", ["w2g64", "w3g128"])
def test_upstream_checkpoints_run_in_onnxruntime(golden_root: Path, tmp_path: Path, case: str) -> None:
    found = proof(export(golden_root / case, tmp_path / "out", container_bits="4"))
    assert found.ok, found.lines()


def test_the_command_proves_an_export_and_takes_it_further(
    eqat: Callable[..., Any], native: MakeCheckpoint, tmp_path: Path
) -> None:
    source, out, back = native(bits=3, architecture="qwen2"), tmp_path / "out", tmp_path / "back"
    assert "--container-bits 4" in eqat("export", source, "--to", "onnx", "--out", out).err
    assert eqat("export", source, "--to", "onnx", "--out", out, "--container-bits", "4").code == 0
    outcome = eqat("verify", out, "--against", source, "--runtime", "onnxruntime", "--json")
    assert outcome.code == 0, outcome.out
    assert json.loads(outcome.out)["runtime"]["ok"] is True
    assert eqat("export", out, "--to", "gptq_v2", "--out", back).code == 0
    assert eqat("verify", back, "--against", source).code == 0
    assert not (back / "genai_config.json").exists() and (back / "generation_config.json").exists()


def load_from(folder: Path) -> Any:
    """A runtime that takes another folder than it is asked to."""

    class Misreading(type(get_runtime("onnxruntime"))):  # type: ignore[misc]
        def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
            return super().load(open_checkpoint(folder), device)

    return Misreading()


@pytest.mark.parametrize("tensor", ["B", "scales", "zero_points"])
def test_one_wrong_byte_is_noticed_in_the_layer_that_has_it(
    native: MakeCheckpoint, tmp_path: Path, tensor: str
) -> None:
    source = native(bits=4)
    good, bad = export(source, tmp_path / "good"), export(source, tmp_path / "bad")
    with open_checkpoint(bad) as checkpoint:
        place = checkpoint.reader.tensors[f"{UP}.{tensor}"]
    data = bytearray((bad / place.shard).read_bytes())
    data[place.offset + 1] ^= 1
    (bad / place.shard).write_bytes(data)
    with open_checkpoint(good) as checkpoint:
        found = check_runtime(checkpoint, load_from(bad))
    assert list(found.wrong_layers) == [UP]


def test_kernels_that_round_activations_are_noticed(native: MakeCheckpoint, tmp_path: Path) -> None:
    found = proof(export(native(bits=4), tmp_path / "out", accuracy_level="4"))
    assert found.weights_ok
    assert not found.logits_ok


def test_a_graph_that_onnxruntime_refuses_is_a_failed_verification(
    eqat: Callable[..., Any], native: MakeCheckpoint, tmp_path: Path
) -> None:
    import onnx  # noqa: PLC0415

    out = export(native(), tmp_path / "out")
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    graph.graph.node[-1].op_type = "NoSuchOperator"
    (out / "model.onnx").write_bytes(graph.SerializeToString())
    outcome = eqat("verify", out, "--runtime", "onnxruntime")
    assert outcome.code == 1
    assert "does not load it" in outcome.out and "NoSuchOperator" in outcome.out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_filled_in_two_steps_gives_the_same_logits(native: MakeCheckpoint, tmp_path: Path, family: str) -> None:
    import onnxruntime  # noqa: PLC0415

    out = export(native(architecture=family), tmp_path / "out")
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = token_ids(257, 1, 24).numpy()
    outputs = [value.name for value in session.get_outputs()]
    empty = {
        value.name: torch.empty(1, value.shape[1], 0, value.shape[3]).numpy()
        for value in session.get_inputs()
        if value.name.startswith("past")
    }

    def run(first: int, last: int, past: dict[str, Any]) -> dict[str, Any]:
        mask = torch.ones(1, last, dtype=torch.int64).numpy()
        found = session.run(None, {"input_ids": ids[:, first:last], "attention_mask": mask, **past})
        return dict(zip(outputs, found, strict=True))

    whole = torch.from_numpy(run(0, 24, empty)["logits"])
    begun = run(0, 15, empty)
    past = {name.replace("present", "past_key_values"): value for name, value in begun.items() if name != "logits"}
    stepped = torch.from_numpy(run(15, 24, past)["logits"])
    assert float((stepped - whole[:, 15:]).abs().max()) < 2e-5 * float(whole.std())


@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_genai_generates_what_transformers_does(
    native: MakeCheckpoint, tmp_path: Path, family: str
) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    out = export(native(architecture=family, bits=4), tmp_path / "out")
    model = genai.Model(str(out))
    prompt = genai.Tokenizer(model).encode("Once upon a time")
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=48, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    with open_checkpoint(out) as checkpoint:
        reference = reference_model(checkpoint, torch.float32, CPU)
    with torch.inference_mode():
        expected = reference.generate(torch.tensor([list(prompt)]), max_length=48, do_sample=False)
    assert len(prompt) == 16  # one token a byte
    assert list(generator.get_sequence(0)) == expected[0].tolist()
