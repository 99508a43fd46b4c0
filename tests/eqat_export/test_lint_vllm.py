"""What vLLM demands of compressed-tensors: our exports meet it, and each rule catches what it is for."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eqat_export.convert import convert
from eqat_export.diagnosis.survey import Survey
from eqat_export.lint import get_engine
from eqat_export.lint.facts import facts_of
from eqat_export.lint.judge import Verdict, broken_rules, judge
from eqat_export.lint.rules import Value, holds
from eqat_export.lint.vllm_compressed_tensors import KERNELS, RULES
from eqat_export.verify import verify_checkpoint
from formats.model import open_checkpoint
from formats.packing import pack_bits, unpack_bits
from formats.types import QuantScheme
from tests.tiny_checkpoints import quantize_folder

Make = Callable[..., Path]
Change = Callable[[dict[str, Tensor]], object]
Q = "model.layers.0.self_attn.q_proj"
QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
VLLM = get_engine("vllm")
# config.json keeps the model's fp32 unless a conversion names the scales' dtype
COSTS = {"model-dtype", "ct-machete"}


def by_headers(folder: Path) -> dict[str, str]:
    """Rules that are broken, of what headers and configuration tell: damaged layers are not judged, but rules are."""
    with open_checkpoint(folder) as checkpoint:
        return {item.rule.id: item.where for item in broken_rules(VLLM, facts_of(checkpoint, Survey()))}


def verdict(folder: Path) -> Verdict:
    survey = Survey()
    with open_checkpoint(folder) as checkpoint:
        return judge(VLLM, checkpoint, survey, verify_checkpoint(checkpoint, survey=survey))


def broken(folder: Path) -> dict[str, str]:
    found = verdict(folder)
    assert "not judged" not in found.text, found.text
    return {item.rule.id: item.where for item in found.broken}


def facts(scheme: QuantScheme, out_features: int = 4096, in_features: int = 4096) -> dict[str, Value]:
    """Of a layer that is computed alone."""
    return {
        "format": "compressed-tensors",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "grouped": scheme.group_size > 0,
        "sym": scheme.sym,
        "in_features": in_features,
        "fused_out": out_features,
        "in_bits": in_features * scheme.bits,
        "fused_bits": out_features * scheme.bits,
        "expert": False,
    }


def kernels(scheme: QuantScheme, out_features: int = 4096, in_features: int = 4096) -> list[str]:
    layer = facts(scheme, out_features, in_features)
    return [kernel.name for kernel in KERNELS if any(holds(taken, layer) for taken in kernel.takes)]


@pytest.fixture
def export(native: Make, tmp_path: Path) -> Path:
    """4 bits with zero-points."""
    return convert(native(bits=4), tmp_path / "out", "compressed-tensors").out


# Exports


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exports_meet_every_rule(native: Make, tmp_path: Path, bits: int, architecture: str) -> None:
    convert(native(bits=bits, architecture=architecture), tmp_path / "out", "compressed-tensors")
    assert broken(tmp_path / "out") == {}


@pytest.mark.parametrize("group", [32, -1])
def test_symmetric_and_channel_exports_meet_every_rule(dense_models: Callable, tmp_path: Path, group: int) -> None:
    folder = quantize_folder(
        dense_models("llama"), tmp_path / "out", QuantScheme(4, group), format_id="compressed-tensors"
    )
    assert set(broken(folder)) <= COSTS


def test_every_rule_names_its_file() -> None:
    assert all(".py" in rule.source or "/;" in rule.source for rule in VLLM.rules)
    assert all(kernel.source and kernel.note and kernel.takes for kernel in KERNELS)
    assert all(rule in VLLM.rules for rule in RULES)


@pytest.mark.parametrize(
    ("dtype", "model", "expected"),
    [
        ("float16", "float16", set()),
        ("float16", "float32", {"model-dtype"}),
        ("bfloat16", "bfloat16", set()),
        ("bfloat16", "float32", set()),
        ("bfloat16", "torch.float16", {"model-float16"}),
        ("float32", "float32", {"scale-dtype"}),
    ],
)
def test_scales_that_lose_digits_or_range(
    native: Make, tmp_path: Path, dtype: str, model: str, expected: set[str]
) -> None:
    source = native(bits=4, scale_dtype=getattr(torch, dtype))
    folder = convert(source, tmp_path / "out", "compressed-tensors", options={"scale_dtype": dtype}).out
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": model}))
    found = verdict(folder)
    assert {item.rule.id for item in found.broken} == expected
    assert found.good


# Damage


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    return folder


def cast(local: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({f"{Q}.{local}": tensors[f"{Q}.{local}"].to(dtype)})


def add(local: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({f"{Q}.{local}": tensor})


def wider(local: str) -> Change:
    """One column too many."""

    def change(tensors: dict[str, Tensor]) -> None:
        old = tensors[f"{Q}.{local}"]
        tensors[f"{Q}.{local}"] = torch.cat([old, old[:, :1]], dim=1)

    return change


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("ct-packed", cast("weight_packed", torch.int64)),
        ("ct-packed", wider("weight_packed")),
        ("ct-scale", cast("weight_scale", torch.int32)),
        ("ct-zero-point", cast("weight_zero_point", torch.int8)),
        ("ct-zero-point", wider("weight_zero_point")),
        ("ct-zero-point", lambda tensors: tensors.pop(f"{Q}.weight_zero_point")),
        ("ct-shape", add("weight_shape", torch.tensor([64, 64, 1]))),
    ],
)
def test_a_damaged_layer_breaks_its_rule(export: Path, edited: Make, rule: str, change: Change) -> None:
    assert by_headers(edited(export, change)) == {rule: Q}


# What the library wrote once, or still reads, and vLLM does not: sound checkpoints


def signed_bytes(tensors: dict[str, Tensor]) -> None:
    """Zero-points of versions before 0.9."""
    zeros = unpack_bits(tensors[f"{Q}.weight_zero_point"], 4, 64, axis=0)
    tensors[f"{Q}.weight_zero_point"] = (zeros.to(torch.int32) - 8).to(torch.int8)


def shape_of_two_axes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight_shape"] = tensors[f"{Q}.weight_shape"].reshape(1, 2)


@pytest.mark.parametrize(
    ("rule", "change", "said"),
    [
        ("ct-zero-point", signed_bytes, "it is int8 [64, 2]"),
        ("ct-shape", shape_of_two_axes, "it is int64 [1, 2]"),
        ("ct-g-idx", add("weight_g_idx", (torch.arange(64) // 32).int()), "weight_g_idx"),
    ],
)
def test_what_only_the_library_reads_is_refused_and_written_anew(
    eqat: Callable, export: Path, edited: Make, tmp_path: Path, rule: str, change: Change, said: str
) -> None:
    folder = edited(export, change)
    found = verdict(folder)
    assert {item.rule.id: item.where for item in found.broken} == {rule: Q}
    assert not found.loads and said in found.text
    assert found.remedy is not None and found.remedy.endswith("--to compressed-tensors")
    assert eqat(*shlex.split(found.remedy)[1:], "--out", tmp_path / "remedy").code == 0
    assert broken(tmp_path / "remedy") == {}


def test_words_of_whole_fields_are_refused(native: Make, edited: Make, tmp_path: Path) -> None:
    """Until version 0.17 a word held ten values of 3 bits."""
    folder = convert(native(bits=3), tmp_path / "out", "compressed-tensors").out

    def old(tensors: dict[str, Tensor]) -> None:
        for local, axis in (("weight_packed", 1), ("weight_zero_point", 0)):
            values = unpack_bits(tensors[f"{Q}.{local}"], 3, 64, axis=axis)
            tensors[f"{Q}.{local}"] = pack_bits(values, 3, axis=axis, per_word=10)

    found = verdict(edited(folder, old))
    assert {item.rule.id for item in found.broken} == {"ct-packed", "ct-zero-point"}
    assert not found.loads and "it is int32 [64, 7]" in found.text


def test_act_order_is_refused(export: Path, edited: Make) -> None:
    folder = edited(export, add("weight_g_idx", (torch.arange(64) // 32).int().flip(0).contiguous()))
    assert broken(folder) == {"ct-act-order": Q}


def test_zero_points_beside_a_symmetric_configuration_break_a_rule(export: Path, edited: Make) -> None:
    def middle(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_zero_point")]:
            tensors[name] = torch.full_like(tensors[name], 0x88888888 - 2**32)

    def symmetric(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"]["symmetric"] = True

    assert broken(change_config(edited(export, middle), symmetric)) == {"ct-no-zero-point": ""}


# Fused linears


def test_a_part_of_a_fused_linear_with_a_scheme_of_its_own_breaks_a_rule(export: Path) -> None:
    def own(config: dict[str, Any]) -> None:
        weights = {**config["config_groups"]["group_0"]["weights"], "group_size": 16}
        config["config_groups"]["group_1"] = {"targets": [Q], "weights": weights}

    assert by_headers(change_config(export, own))["ct-fused"] in QKV


def unquantize(*names: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            out_features = tensors[f"{name}.weight_packed"].shape[0]
            for local in ("packed", "scale", "zero_point", "shape"):
                del tensors[f"{name}.weight_{local}"]
            tensors[f"{name}.weight"] = torch.zeros(out_features, 64)

    return change


def test_a_part_of_a_fused_linear_that_is_ignored_breaks_a_rule(export: Path, edited: Make) -> None:
    folder = change_config(edited(export, unquantize(Q)), lambda config: config["ignore"].append(Q))
    assert set(broken(folder)) == {"ct-fused", "ct-ignore"}
    assert next(item for item in verdict(folder).broken if item.rule.id == "ct-ignore").text.endswith(
        f"here it names {Q} and not the others"
    )


def test_ignore_names_all_parts_of_a_fused_linear_or_none(
    eqat: Callable, export: Path, edited: Make, tmp_path: Path
) -> None:
    folder = change_config(edited(export, unquantize(*QKV)), lambda config: config["ignore"].append(Q))
    found = verdict(folder)
    assert {item.rule.id for item in found.broken} == {"ct-ignore"}
    assert found.remedy is not None and found.remedy.endswith("--to compressed-tensors")
    assert eqat(*shlex.split(found.remedy)[1:], "--out", tmp_path / "remedy").code == 0
    assert broken(tmp_path / "remedy") == {}
    change_config(folder, lambda config: config["ignore"].append("re:.*0.self_attn.[kv]_proj"))
    assert broken(folder) == {}


def rule_is_broken(rule_id: str, layer: dict[str, Value]) -> bool:
    return next(rule for rule in RULES if rule.id == rule_id).broken_by(layer)


def test_zero_points_of_fused_parts_fill_words() -> None:
    layer = {**facts(QuantScheme(3, 64)), "fused": True, "out_features": 40, "out_bits": 120}
    assert rule_is_broken("ct-words", layer)
    assert not rule_is_broken("ct-words", {**layer, "fused": False})
    assert not rule_is_broken("ct-words", {**layer, "sym": True})
    assert not rule_is_broken("ct-words", {**layer, "out_bits": 96})


def test_groups_divide_in_features() -> None:
    assert rule_is_broken("ct-groups", {**facts(QuantScheme(4, 32)), "whole_groups": False})
    assert not rule_is_broken("ct-groups", {**facts(QuantScheme(4, 32)), "whole_groups": True})


# Kernels


def test_which_kernel_runs_what() -> None:
    assert kernels(QuantScheme(4, 128))[0] == "Machete"
    assert kernels(QuantScheme(4, 32))[0] == "Marlin"
    for bits in (2, 3, 5, 6, 7):
        assert kernels(QuantScheme(bits, 64)) == kernels(QuantScheme(bits, 64, sym=True)) == ["Humming"]
    assert kernels(QuantScheme(3, 64), out_features=40) == []  # 120 bits: no whole words
    assert kernels(QuantScheme(2, 48)) == []  # does not nest with its tiles
    assert kernels(QuantScheme(1, 128)) == []


def taken(bits: int, group: int, sym: bool, out_features: int, in_features: int) -> list[str]:
    """The kernels again, as code, from a reading of the same sources made apart."""
    names = []
    if bits in (4, 8) and group in (-1, 64, 128) and in_features % 64 == 0 and out_features % 128 == 0:
        names.append("Machete")
    if (bits == 4 or (bits == 8 and sym)) and group in (-1, 32, 64, 128):
        names.append("Marlin")
    if bits in (4, 8) and sym and group > 0 and out_features % 8 == 0:
        names.append("Exllama")
    if bits == 4 and group in (-1, 32, 64, 128, 256) and out_features % 8 == 0:
        names.append("Triton")
    whole = in_features * bits % 32 == 0 and out_features * bits % 32 == 0
    nests = group in (-1, 16) or (group >= 32 and group % 32 == 0)
    if 2 <= bits <= 8 and whole and nests and in_features % 8 == 0 and out_features % 8 == 0:
        names.append("Humming")
    return names


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [-1, 16, 32, 48, 64, 96, 128, 256])
def test_kernels_are_those_of_another_reading(bits: int, group_size: int) -> None:
    for sym in (False, True):
        for in_features in (64, 96, 100, 4096):
            for out_features in (16, 36, 40, 64, 4096):
                scheme = QuantScheme(bits, group_size, sym=sym)
                expected = taken(bits, group_size, sym, out_features, in_features)
                assert kernels(scheme, out_features, in_features) == expected
                layer = facts(scheme, out_features, in_features)
                refused = rule_is_broken("ct-kernel", layer) or rule_is_broken("ct-bits", layer)
                assert refused is not bool(expected), layer


def test_fused_parts_reach_a_kernel_as_one(export: Path) -> None:
    with open_checkpoint(export) as checkpoint:
        layers = facts_of(checkpoint, Survey())
        sizes = [checkpoint.layer_features(name)[0] for name in QKV]
    assert max(sizes) < sum(sizes)
    assert {layers[name]["fused_out"] for name in QKV} == {sum(sizes)}
    assert {layers[name]["fused_bits"] for name in QKV} == {4 * sum(sizes)}
    # parts of 40 columns at 3 bits end inside a word, four of them together do not
    part: dict[str, Value] = {**facts(QuantScheme(3, 64, sym=True), 160), "out_features": 40, "out_bits": 120}
    assert not rule_is_broken("ct-kernel", part)
    assert rule_is_broken("ct-kernel", {**part, "fused_out": 40, "fused_bits": 120})


def test_machete_rounds_zero_points_only() -> None:
    layer = facts(QuantScheme(4, 128))
    assert rule_is_broken("ct-machete", layer)
    assert not rule_is_broken("ct-machete", {**layer, "sym": True})
    assert not rule_is_broken("ct-machete", {**layer, "group_size": 32})
