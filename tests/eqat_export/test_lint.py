"""``eqat verify --for ENGINE``: the verdict, the reason, the way out, and that the way out is one."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.diagnosis.survey import Survey
from eqat_export.lint import ENGINES, get_engine
from eqat_export.lint.facts import facts_of
from eqat_export.lint.judge import Verdict, judge
from eqat_export.lint.rules import Multiple, Rule, holds
from eqat_export.lint.written import WRITTEN, as_written
from eqat_export.verify import verify_checkpoint
from formats import QuantScheme, available_formats, get_format
from formats.errors import UnsupportedSchemeError
from formats.model import open_checkpoint
from tests.tiny_checkpoints import act_order_layer, quantize_folder

Make = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"
CASES = [(engine, form) for engine in ENGINES for form in ("dense", *WRITTEN)]


def verdict(folder: Path, engine: str, source_format: str | None = None) -> Verdict:
    survey = Survey()
    with open_checkpoint(folder, source_format) as checkpoint:
        findings = verify_checkpoint(checkpoint, survey=survey)
        return judge(get_engine(engine), checkpoint, survey, findings)


def broken(folder: Path, engine: str) -> dict[str, str]:
    return {item.rule.id: item.rule.effect for item in verdict(folder, engine).broken}


def configure(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    for name in ("config.json", "quantize_config.json"):
        path = folder / name
        if path.exists():
            value = json.loads(path.read_text())
            change(value["quantization_config"] if name == "config.json" else value)
            path.write_text(json.dumps(value))
    return folder


@pytest.fixture
def symmetric(dense_models: Callable[[str], Path], tmp_path: Path) -> Make:
    """Round-to-nearest checkpoints whose configuration says sym."""

    def make(bits: int = 4, form: str = "gptq", group_size: int = 32, name: str = "symmetric") -> Path:
        def centred(layer):
            return layer.__class__(
                layer.codes,
                layer.scales,
                torch.full_like(layer.zeros, 2 ** (bits - 1)),
                QuantScheme(bits, group_size, sym=True),
                bias=layer.bias,
            )

        scheme = QuantScheme(bits, group_size)
        return quantize_folder(dense_models("llama"), tmp_path / name, scheme, format_id=form, change=centred)

    return make


# The rules themselves


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rule_says_what_where_and_of_which_format(engine: str) -> None:
    rules = get_engine(engine).rules
    known = {"dense", *WRITTEN}
    assert len({rule.id for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.formats and set(rule.formats) <= known
        assert rule.says and rule.source
        assert rule.effect in ("refused", "misread", "argument", "cost")
    assert set(get_engine(engine).reads) <= known


@pytest.mark.parametrize(("engine", "form"), CASES)
def test_every_engine_has_an_answer_for_every_format(engine: str, form: str) -> None:
    rules = get_engine(engine)
    if form not in rules.reads:
        assert any(form in rule.formats and rule.effect in ("refused", "misread") for rule in rules.rules) or not [
            rule for rule in rules.rules if form in rule.formats
        ]


def test_every_registered_format_is_known() -> None:
    assert set(WRITTEN) <= set(available_formats())


def test_rules_speak_only_of_facts_there_are(symmetric: Make) -> None:
    """A misspelt fact would make a rule that never speaks."""
    known = {"packing_format", "ggml_type", "experts_alike", "expert_names"}
    for form in ("gptq", "compressed-tensors"):
        with open_checkpoint(symmetric(form=form, name=form)) as checkpoint:
            survey = Survey()
            verify_checkpoint(checkpoint, survey=survey)
            known |= set(facts_of(checkpoint, survey)[Q])
    for engine in ENGINES:
        for rule in get_engine(engine).rules:
            assert _named(rule) <= known, rule.id
            assert set(_fields(rule.says)) <= known, rule.id


def _fields(text: str) -> list[str]:
    return [part.partition("}")[0].partition("!")[0] for part in text.split("{")[1:]]


def test_conditions() -> None:
    rule = Rule(
        "r", ("gptq",), "refused", "", "", when={"bits": (3,)}, needs=({"size": Multiple(32)}, {"free": (True,)})
    )
    assert rule.broken_by({"format": "gptq", "bits": 3, "size": 33, "free": False})
    assert not rule.broken_by({"format": "gptq", "bits": 3, "size": 64, "free": False})
    assert not rule.broken_by({"format": "gptq", "bits": 3, "size": 33, "free": True})
    assert not rule.broken_by({"format": "gptq", "bits": 4, "size": 33, "free": False})
    assert not rule.broken_by({"format": "gptq_v2", "bits": 3, "size": 33, "free": False})
    assert not rule.broken_by({"format": "gptq", "size": 33, "free": False}), "unknown bits: it says nothing"
    assert not rule.broken_by({"format": "gptq", "bits": 3}), "unknown facts break nothing"
    assert Rule("r", ("gptq",), "refused", "", "").broken_by({"format": "gptq"})
    assert holds({}, {})


# What an export looks like


@pytest.mark.parametrize("target", [form for form in available_formats() if form not in ("dense", "native")])
@pytest.mark.parametrize("bits", [2, 4])
def test_exports_have_the_facts_that_remedies_count_on(native: Make, tmp_path: Path, target: str, bits: int) -> None:
    survey, source_survey = Survey(), Survey()
    source = native(bits=bits)
    try:
        out = convert(source, tmp_path / "out", target).out
    except UnsupportedSchemeError as exc:
        pytest.skip(f"not held: {exc}")
    with open_checkpoint(source) as checkpoint:
        verify_checkpoint(checkpoint, survey=source_survey)
        expected = as_written(facts_of(checkpoint, source_survey), target)
    with open_checkpoint(out) as checkpoint:
        verify_checkpoint(checkpoint, survey=survey)
        found = facts_of(checkpoint, survey)
    assert set(found) == set(expected)
    asked = {
        name
        for engine in ENGINES
        for rule in get_engine(engine).rules
        if target in rule.formats
        for name in _named(rule)
    }
    for name, facts in expected.items():
        wrong = {key: (facts[key], found[name][key]) for key in asked & set(facts) & set(found[name])}
        # a format may complement groups, so symmetry and the range of zeros are not the source's
        moved = ("lowest_zero", "highest_zero", "symmetric")
        assert not {key for key, (was, now) in wrong.items() if was != now and key not in moved}, wrong


def _named(rule: Rule) -> set[str]:
    return {*rule.when, *(fact for needed in rule.needs for fact in needed)}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["native", "gptq", "gptq_v2"])
def test_the_remedy_is_one(eqat: Callable, native: Make, tmp_path: Path, engine: str, form: str, bits: int) -> None:
    folder = native(bits=bits, format_id=form)
    first = verdict(folder, engine)
    if first.good:
        assert first.remedy is None
        return
    assert first.text.startswith(f"{engine} {get_engine(engine).version} ")
    if first.remedy is None:
        assert not {route.split()[0] for route in get_engine(engine).routes} & {*available_formats()} - {"dense"}
        return
    assert first.text.endswith(f"; use: {first.remedy}")
    command = shlex.split(first.remedy)
    out = tmp_path / f"remedy{get_format(command[command.index('--to') + 1]).suffix}"
    assert eqat(*command[1:], "--out", out).code == 0
    again = verdict(out, engine)
    assert again.good, again.text


# The command


def test_the_verdict_stands_on_a_line_of_its_own_and_in_the_json(eqat: Callable, native: Make) -> None:
    folder = native(bits=2, format_id="gptq_v2")
    good = eqat("verify", folder, "--for", "gptqmodel")
    assert good.code == 0
    assert good.out.splitlines()[1].endswith("gptqmodel 7.6.0 loads it and reads it right")
    bad = eqat("verify", folder, "--for", "vllm")
    assert bad.code == 1
    assert "vllm 0.33.0 does not load it: takes GPTQ with sym true at 4 or 8 bits only; here 2 bits" in bad.out
    assert f"use: eqat export {folder} --to " in bad.out
    report = json.loads(eqat("verify", folder, "--for", "vllm", "--json").out)
    assert report["ok"] is False
    assert (report["engine"]["engine"], report["engine"]["loads"], report["engine"]["right"]) == ("vllm", False, False)
    assert report["engine"]["rules"][0]["id"] == "gptq-scheme"
    assert "auto_gptq.py" in report["engine"]["rules"][0]["source"]
    assert report["engine"]["remedy"].startswith("eqat export")
    assert json.loads(eqat("verify", folder, "--json").out)["engine"] is None


def test_an_unknown_engine_lists_the_known(eqat: Callable, native: Make) -> None:
    outcome = eqat("verify", native(), "--for", "vlmm")
    assert outcome.code == 2
    assert "unknown engine 'vlmm'; known are vllm, sglang, llama.cpp, mlx, transformers, gptqmodel" in outcome.err


def test_the_help_names_every_engine(eqat: Callable) -> None:
    text = " ".join(eqat("verify", "--help").out.replace("│", " ").split())
    assert all(engine in text for engine in ENGINES)


def test_a_damaged_checkpoint_is_not_judged(eqat: Callable, native: Make, edited: Make) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{UP}.scales"]

    outcome = eqat("verify", edited(native(format_id="gptq_v2"), damage), "--for", "gptqmodel")
    assert outcome.code == 1
    assert "gptqmodel 7.6.0 is not judged: the checkpoint is damaged" in outcome.out


def test_a_full_precision_model_is_judged_too(eqat: Callable, dense_models: Callable[[str], Path]) -> None:
    assert eqat("verify", dense_models("llama"), "--for", "vllm").code == 0
    assert eqat("verify", dense_models("llama"), "--for", "llama.cpp").code == 1


# Single rules, each broken by what it is for


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_symmetric_gptq_whose_zeros_are_others_is_misread(symmetric: Make, edited: Make, engine: str) -> None:
    folder = symmetric(group_size=64)
    assert set(broken(folder, engine)) <= {"shape", "model-dtype"}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.qzeros"][0, 0] ^= 1

    assert broken(edited(folder, change), engine)["gptq-zeros"] == "misread"


def test_sglang_wants_marlins_shapes(symmetric: Make) -> None:
    assert broken(symmetric(), "sglang")["shape"] == "refused"  # 64 x 64 layers
    assert "shape" not in broken(symmetric(name="again"), "vllm")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_act_order_without_desc_act_is_misread(symmetric: Make, edited: Make, engine: str) -> None:
    def reorder(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("g_idx"):
                tensors[name] = tensor.flip(0).contiguous()

    folder = edited(symmetric(), reorder)
    assert broken(folder, engine)["g-idx"] == "misread"
    assert "gptq-desc-act" not in broken(folder, engine)
    assert "gptq-desc-act" in broken(configure(folder, lambda config: config.update(desc_act=True)), "vllm")


def test_a_configuration_beside_config_json_needs_an_argument(symmetric: Make) -> None:
    folder = symmetric()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    assert broken(folder, "vllm")["configured"] == "argument"
    assert "with an argument: looks for quantization_config" in verdict(folder, "vllm").text
    assert broken(folder, "transformers")["configured"] == "misread"
    assert "configured" not in broken(folder, "gptqmodel")


def test_a_part_of_a_fused_linear_with_a_rule_of_its_own(symmetric: Make) -> None:
    folder = configure(symmetric(), lambda config: config.update(dynamic={f"+:^{Q}$": {"sym": False}}))
    assert broken(folder, "vllm")["gptq-fused"] == "refused"
    found = next(item for item in verdict(folder, "transformers").broken if item.rule.id == "gptq-overrides")
    assert found.layers == 1 and found.where == Q and f"(in 1 of 14 layers, e.g. {Q})" in found.text


def test_linears_in_full_precision_among_quantized_ones(symmetric: Make, edited: Make) -> None:
    def unquantize(tensors: dict[str, torch.Tensor]) -> None:
        for local in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{UP}.{local}"]
        tensors[f"{UP}.weight"] = torch.zeros(128, 64)

    folder = configure(edited(symmetric(), unquantize), lambda config: config.update(dynamic={f"-:^{UP}$": {}}))
    assert broken(folder, "transformers")["gptq-kept"] == "misread"
    assert "gptq-kept" not in broken(folder, "gptqmodel")
    assert broken(folder, "vllm")["gptq-fused"] == "refused"


def test_gptqmodel_wants_a_tokenizer_and_a_producer(native: Make) -> None:
    folder = native(bits=4, format_id="gptq")
    assert verdict(folder, "gptqmodel").good
    (folder / "tokenizer.json").unlink()
    assert broken(folder, "gptqmodel")["tokenizer"] == "refused"
    configure(folder, lambda config: config["meta"].update(quantizer=["auto_gptq:0.7.1"]))
    assert broken(folder, "gptqmodel")["v1-producer"] == "refused"
    configure(folder, lambda config: config["meta"].update(quantizer=["gptqmodel:0.8.9"]))
    assert broken(folder, "gptqmodel")["v1-producer"] == "refused"
    configure(folder, lambda config: config["meta"].update(quantizer=["gptqmodel:2.2.0"]))
    assert "v1-producer" not in broken(folder, "gptqmodel")


def test_group_sizes_without_a_kernel(dense_models: Callable, tmp_path: Path) -> None:
    folder = quantize_folder(dense_models("llama"), tmp_path / "out", QuantScheme(4, 16), format_id="gptq_v2")
    assert broken(folder, "vllm")["gptq-group"] == "refused"
    assert "group" not in broken(folder, "gptqmodel")


def test_act_order_is_no_obstacle_where_g_idx_is_read(dense_models: Callable, tmp_path: Path) -> None:
    folder = quantize_folder(
        dense_models("llama"), tmp_path / "out", QuantScheme(4, 32), format_id="gptq_v2", change=act_order_layer
    )
    assert verdict(folder, "gptqmodel").good
    assert verdict(folder, "transformers").good


def test_stray_files_are_loaded_by_engines_that_take_every_file(dense_models: Callable, tmp_path: Path) -> None:
    folder = shutil.copytree(dense_models("llama"), tmp_path / "copy")
    assert verdict(folder, "mlx").good
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00009.safetensors")
    assert broken(folder, "mlx")["stray-files"] == "misread"
    assert verdict(folder, "vllm").good
