"""Verification finds what is wrong, names it, and says nothing about what is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.verify import verify_checkpoint
from formats.model import open_checkpoint

UP = "model.layers.1.mlp.up_proj"
GATE = "model.layers.1.mlp.gate_proj"

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def exported(native: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A native checkpoint and its GPTQ v1 export."""
    source = native(bits=4)
    convert(source, tmp_path / "v1", "gptq")
    return source, tmp_path / "v1"


def findings(folder: Path, severity: str) -> list[str]:
    with open_checkpoint(folder) as checkpoint:
        return [f"{item.where}: {item.text}" for item in verify_checkpoint(checkpoint) if item.severity == severity]


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def flip_code(tensors: Tensors) -> None:
    tensors[f"{UP}.qweight"][3, 5] ^= 1


def change_zero(tensors: Tensors) -> None:
    tensors[f"{UP}.qzeros"][0, 0] ^= 1


def change_scale(tensors: Tensors) -> None:
    tensors[f"{UP}.scales"][0, 7] *= 1.01


def swap_layers(tensors: Tensors) -> None:
    for local in ("qweight", "qzeros", "scales"):
        up, gate = f"{UP}.{local}", f"{GATE}.{local}"
        tensors[up], tensors[gate] = tensors[gate], tensors[up]


def change_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight"][3] *= 1.01


def drop_norm(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


def add_tensor(tensors: Tensors) -> None:
    tensors["model.extra.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (flip_code, UP),
        (change_zero, UP),
        (change_scale, UP),
        (swap_layers, UP),
        (change_norm, "model.norm.weight"),
        (drop_norm, "model.norm.weight"),
        (add_tensor, "model.extra.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_single_difference_is_found_and_named(
    eqat: Callable, exported: tuple[Path, Path], edited: Callable[..., Path], change: Callable, named: str
) -> None:
    source, export = exported
    assert eqat("verify", export, "--against", source).code == 0
    outcome = eqat("verify", edited(export, change), "--against", source)
    assert outcome.code == 1
    assert outcome.out.startswith("✗ ") or outcome.out.startswith("FAILED")
    assert named in outcome.out


@pytest.mark.parametrize(("label", "other"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_a_wrong_zero_convention_is_found_against_the_source(
    eqat: Callable, native: Callable[..., Path], tmp_path: Path, label: str, other: str
) -> None:
    source = native(bits=4)
    convert(source, tmp_path / "out", label)
    for name in ("config.json", "quantize_config.json"):
        path = tmp_path / "out" / name
        path.write_text(path.read_text().replace(f'"{label}"', f'"{other}"').replace(f'd": "{other}"', 'd": "gptq"'))
    outcome = eqat("verify", tmp_path / "out", "--against", source)
    assert outcome.code == 1


def test_a_wrong_zero_convention_is_found_alone(eqat: Callable, golden_root: Path, tmp_path: Path) -> None:
    convert(golden_root / "w2g64", tmp_path / "out", "gptq_v2")
    assert eqat("verify", tmp_path / "out").code == 0
    for name in ("config.json", "quantize_config.json"):
        path = tmp_path / "out" / name
        path.write_text(path.read_text().replace('"gptq_v2"', '"gptq"'))
    outcome = eqat("verify", tmp_path / "out")
    assert outcome.code == 1
    assert "gptq_v2" in outcome.out and "qzeros" in outcome.out


def test_the_worst_layer_comes_first_and_the_counts_are_right(
    eqat: Callable, exported: tuple[Path, Path], edited: Callable[..., Path]
) -> None:
    source, export = exported

    def change(tensors: Tensors) -> None:
        flip_code(tensors)
        tensors[f"{GATE}.scales"] *= 2

    report = json.loads(eqat("verify", edited(export, change), "--against", source, "--json").out)
    first, second, third = report["comparison"]["layers"][:3]
    assert (first["name"], first["ok"], first["codes"], first["zeros"], first["scales"]) == (GATE, False, 0, 0, 256)
    assert first["relative"] == pytest.approx(1.0)
    assert (second["name"], second["ok"], second["codes"], second["zeros"], second["scales"]) == (UP, False, 1, 0, 0)
    assert third["ok"] and third["error"] == 0
    assert report["ok"] is False


def test_rounded_scales_pass_within_the_declared_bound_and_fail_beyond(
    eqat: Callable, native: Callable[..., Path], edited: Callable[..., Path], tmp_path: Path
) -> None:
    source = native(bits=3, scale_dtype=torch.float32)
    convert(source, tmp_path / "v2", "gptq_v2")
    good = eqat("verify", tmp_path / "v2", "--against", source)
    assert good.code == 0
    assert "within the declared rounding" in good.out

    def next_scale(tensors: Tensors) -> None:
        tensors[f"{UP}.scales"].view(torch.int16)[0, 0] += 1

    assert eqat("verify", edited(tmp_path / "v2", next_scale), "--against", source).code == 1


def test_dense_exports_are_compared_with_their_source(
    eqat: Callable, native: Callable[..., Path], edited: Callable[..., Path], tmp_path: Path
) -> None:
    source = native(bits=4, architecture="qwen2")
    convert(source, tmp_path / "dense", "dense", options={"dtype": "bfloat16"})
    assert eqat("verify", tmp_path / "dense", "--against", source).code == 0

    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.weight"].view(torch.int16)[0, 0] += 1

    assert eqat("verify", edited(tmp_path / "dense", change), "--against", source).code == 1

    def change_bias(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"][0] += 1

    outcome = eqat("verify", edited(tmp_path / "dense", change_bias, "bias"), "--against", source)
    assert outcome.code == 1
    assert "q_proj.bias" in outcome.out


def test_against_full_precision_the_quantization_error_is_information(
    eqat: Callable, native: Callable[..., Path], dense_models: Callable[[str], Path], edited: Callable[..., Path]
) -> None:
    folder = edited(native(bits=8, group_size=-1), change_norm)
    report = json.loads(eqat("verify", folder, "--against", dense_models("llama"), "--json").out)
    assert report["ok"] is True
    assert report["comparison"]["informational"] is True
    with open_checkpoint(folder) as quantized, open_checkpoint(dense_models("llama")) as model:
        found = dict(quantized.dense_tensors())
        for row in report["comparison"]["layers"]:
            exact = model.get(f"{row['name']}.weight").double()
            error = (found[f"{row['name']}.weight"].double() - exact).norm() / exact.norm()
            assert row["relative"] == pytest.approx(float(error), rel=1e-5)


def nan_scale(tensors: Tensors) -> None:
    tensors[f"{UP}.scales"][1, 1] = float("nan")


def nan_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight"][0] = float("inf")


def short_zeros(tensors: Tensors) -> None:
    tensors[f"{UP}.qzeros"] = tensors[f"{UP}.qzeros"][:, :-1].contiguous()


def missing_scales(tensors: Tensors) -> None:
    del tensors[f"{UP}.scales"]


def wrong_dtype(tensors: Tensors) -> None:
    tensors[f"{UP}.qweight"] = tensors[f"{UP}.qweight"].long()


@pytest.mark.parametrize(
    ("change", "named"),
    [(nan_scale, UP), (nan_norm, "model.norm.weight"), (short_zeros, UP), (missing_scales, UP), (wrong_dtype, UP)],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("export_to", ["native", "gptq"])
def test_a_defect_is_found_without_another_checkpoint(
    eqat: Callable,
    native: Callable[..., Path],
    tmp_path: Path,
    edited: Callable[..., Path],
    change: Callable,
    named: str,
    export_to: str,
) -> None:
    convert(native(bits=4), tmp_path / "sound", export_to)
    assert not findings(tmp_path / "sound", "error")
    outcome = eqat("verify", edited(tmp_path / "sound", change))
    assert outcome.code == 1
    assert named in outcome.out
    assert len(json.loads(eqat("verify", tmp_path / "edited", "--json").out)["findings"]) >= 1


def test_zero_scales_are_counted_as_a_warning(native: Callable[..., Path], edited: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.scales"][:2, 0] = 0

    folder = edited(native(), change)
    assert not findings(folder, "error")
    assert any(text.startswith("scales: 2 groups") for text in findings(folder, "warning"))


def test_configuration_files_that_disagree_are_an_error(exported: tuple[Path, Path]) -> None:
    _, export = exported
    edit_json(export, "config.json", lambda config: config["quantization_config"].update(desc_act=True))
    (text,) = findings(export, "error")
    assert "desc_act" in text and "config.json says True" in text and "quantize_config.json says False" in text


@pytest.mark.parametrize("field", ["bits", "group_size"])
def test_a_configuration_that_contradicts_the_shapes_is_an_error(exported: tuple[Path, Path], field: str) -> None:
    _, export = exported
    edit_json(export, "config.json", lambda config: config["quantization_config"].update({field: 8}))
    edit_json(export, "quantize_config.json", lambda config: config.update({field: 8}))
    assert len(findings(export, "error")) == 14


def test_modules_are_what_the_configuration_says(native: Callable[..., Path], edited: Callable[..., Path]) -> None:
    folder = native()
    edit_json(folder, "config.json", lambda config: config["quantization_config"]["modules_to_not_convert"].append(UP))
    (text,) = findings(folder, "error")
    assert UP in text

    def unquantize(tensors: Tensors) -> None:
        for local in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{GATE}.{local}"]
        tensors[f"{GATE}.weight"] = torch.zeros(128, 64)

    assert any(text.startswith(GATE) for text in findings(edited(native("second"), unquantize), "warning"))


def test_a_missing_tokenizer_is_a_warning(exported: tuple[Path, Path]) -> None:
    _, export = exported
    (export / "tokenizer.json").unlink()
    assert any("no tokenizer" in text for text in findings(export, "warning"))
    assert not findings(export, "error")


@pytest.mark.parametrize("name", ["w2g64", "w3g128"])
def test_upstream_checkpoints_are_sound(golden_root: Path, name: str) -> None:
    assert not findings(golden_root / name, "error")
    assert not findings(golden_root / name, "warning")


def test_a_full_precision_model_can_be_verified(eqat: Callable, dense_models: Callable[[str], Path]) -> None:
    outcome = eqat("verify", dense_models("qwen3"))
    assert outcome.code == 0
    assert "full precision: sound" in outcome.out


def test_output_is_plain_when_piped_and_quiet_when_asked(eqat: Callable, exported: tuple[Path, Path]) -> None:
    source, export = exported
    shown = eqat("verify", export, "--against", source)
    assert "\x1b" not in shown.out
    quiet = eqat("verify", export, "--against", source, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_reading_against_label_and_values_is_an_error(eqat: Callable, golden_root: Path, tmp_path: Path) -> None:
    convert(golden_root / "w2g64", tmp_path / "v1", "gptq")
    outcome = eqat("verify", tmp_path / "v1", "--from", "gptq_v2")
    assert outcome.code == 1
    assert "read as gptq_v2 by --from, against the label and the values" in outcome.out


def test_checkpoints_of_different_bits_are_told_apart_first(eqat: Callable, native: Callable[..., Path]) -> None:
    two, three = native("two", bits=2), native("three", bits=3)
    outcome = eqat("verify", two, "--against", three)
    assert outcome.code == 1
    assert outcome.out.splitlines()[1] == f"  error: scheme: w2g32 here, w3g32 in {three}"


def test_no_error_against_full_precision_is_said_in_one_line(
    eqat: Callable, native: Callable[..., Path], tmp_path: Path
) -> None:
    source = native()
    convert(source, tmp_path / "dense", "dense", options={"dtype": "float32"})
    outcome = eqat("verify", source, "--against", tmp_path / "dense")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].endswith("layers hold the same weights, bit for bit")
