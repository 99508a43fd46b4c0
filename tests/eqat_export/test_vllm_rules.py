"""What vLLM requires of compressed-tensors: our exports meet it, and each rule catches what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.vllm_rules import KERNELS, LAYER_RULES, MODEL_RULES, broken_rules
from formats.model import open_checkpoint
from formats.types import QuantScheme
from tests.tiny_checkpoints import quantize_folder

Q = "model.layers.0.self_attn.q_proj"


def broken(folder: Path) -> dict[str, str]:
    with open_checkpoint(folder) as checkpoint:
        return {rule.id: layer for rule, layer in broken_rules(checkpoint)}


def kernel(scheme: QuantScheme, out_features: int = 4096, in_features: int = 4096) -> list[str]:
    return [kernel.name for kernel in KERNELS if kernel.takes(scheme, out_features, in_features)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exports_meet_every_rule(native: Callable[..., Path], tmp_path: Path, bits: int, architecture: str) -> None:
    convert(native(bits=bits, architecture=architecture), tmp_path / "out", "compressed-tensors")
    assert broken(tmp_path / "out") == {}


def test_symmetric_and_channel_exports_meet_every_rule(dense_models: Callable, tmp_path: Path) -> None:
    for group in (32, -1):
        folder = quantize_folder(
            dense_models("llama"), tmp_path / f"out{group}", QuantScheme(4, group), format_id="compressed-tensors"
        )
        # config.json keeps the model's fp32 unless a conversion names the scales' dtype
        assert set(broken(folder)) <= {"scale-dtype"}


def test_every_rule_names_its_file() -> None:
    assert all(rule.source and rule.says and rule.fix for rule in (*LAYER_RULES, *MODEL_RULES))
    assert len({rule.id for rule in (*LAYER_RULES, *MODEL_RULES)}) == len(LAYER_RULES) + len(MODEL_RULES)


def test_scales_of_fp32_lose_digits(native: Callable[..., Path], tmp_path: Path) -> None:
    folder = native(bits=4, scale_dtype=torch.float32)
    convert(folder, tmp_path / "fp32", "compressed-tensors", options={"scale_dtype": "float32"})
    assert broken(tmp_path / "fp32") == {"scale-dtype": ""}


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.{new}"] = tensors.pop(f"{Q}.{old}")

    return change


def cast(local: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.{local}"] = tensors[f"{Q}.{local}"].to(dtype)

    return change


def add(local: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{Q}.{local}": tensor})


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("packed", cast("weight_packed", torch.int64)),
        ("scale", cast("weight_scale", torch.int32)),
        ("zero-point", cast("weight_zero_point", torch.int8)),
        ("zero-point", lambda tensors: tensors.pop(f"{Q}.weight_zero_point")),
        ("shape", cast("weight_shape", torch.float32)),
        ("act-order", add("weight_g_idx", torch.zeros(64, dtype=torch.int32))),
    ],
)
def test_a_damaged_layer_breaks_its_rule(native: Callable[..., Path], tmp_path: Path, edited, rule, change) -> None:
    convert(native(bits=4), tmp_path / "out", "compressed-tensors")
    assert broken(edited(tmp_path / "out", change))[rule] == Q


def test_zero_points_beside_a_symmetric_configuration_break_a_rule(native: Callable[..., Path], tmp_path: Path) -> None:
    convert(native(bits=4), tmp_path / "out", "compressed-tensors")

    def symmetric(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"]["symmetric"] = True

    change_config(tmp_path / "out", symmetric)
    assert list(broken(tmp_path / "out")) == ["no-zero-point"]


def test_a_part_of_a_fused_linear_with_a_scheme_of_its_own_breaks_a_rule(
    native: Callable[..., Path], tmp_path: Path
) -> None:
    convert(native(bits=4), tmp_path / "out", "compressed-tensors")

    def own(config: dict[str, Any]) -> None:
        weights = {**config["config_groups"]["group_0"]["weights"], "group_size": 16}
        config["config_groups"]["group_1"] = {"targets": [Q], "weights": weights}

    change_config(tmp_path / "out", own)
    assert "fused-scheme" in broken(tmp_path / "out")


def test_a_part_of_a_fused_linear_that_is_ignored_breaks_a_rule(native: Callable[..., Path], edited, tmp_path) -> None:
    convert(native(bits=4), tmp_path / "out", "compressed-tensors")

    def dense(tensors: dict[str, torch.Tensor]) -> None:
        for local in ("packed", "scale", "zero_point", "shape"):
            del tensors[f"{Q}.weight_{local}"]
        tensors[f"{Q}.weight"] = torch.zeros(64, 64)

    folder = edited(tmp_path / "out", dense)
    change_config(folder, lambda config: config["ignore"].append(Q))
    assert set(broken(folder)) == {"fused-scheme", "fused-ignore"}


def test_which_kernel_runs_what() -> None:
    assert kernel(QuantScheme(4, 128))[0] == "Machete"
    assert kernel(QuantScheme(4, 32))[0] == "Marlin"
    for bits in (2, 3, 5, 6, 7):
        assert kernel(QuantScheme(bits, 64)) == kernel(QuantScheme(bits, 64, sym=True)) == ["Humming"]
    assert kernel(QuantScheme(3, 64), out_features=40) == []  # 120 bits: no whole words
    assert kernel(QuantScheme(2, 48)) == []  # does not nest with its tiles
    assert kernel(QuantScheme(1, 128)) == []
