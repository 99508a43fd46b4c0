"""Settings: names, types, ranges, precedence, and what depends on the model."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from eqat_train.config import TrainConfig, build_config, demo_preset, read_config, resolve_config, save_config
from formats.errors import InputError
from formats.types import QuantScheme

NAMES = {item.name for item in fields(TrainConfig)}


def yaml_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_are_the_papers() -> None:
    config, notes = resolve_config(build_config({"model": "m"}), context=131072, scheme=None)
    paper = {
        "bits": 2,
        "group": 64,
        "samples": 4096,
        "seq_len": 2048,
        "batch": 2,
        "epochs": 2,
        "lr_weight": 2e-5,
        "lr_scale": 1e-4,
        "lr_zero": 1e-4,
        "min_lr_factor": 20,
        "weight_decay": 0,
        "e2e_samples": 4096,
        "e2e_seq_len": 4096,
        "e2e_batch": 32,
        "e2e_epochs": 1,
        "lr_e2e": 2e-5,
        "max_grad_norm": 0.3,
    }
    assert {name: getattr(config, name) for name in paper} == paper
    assert notes == []


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_learning_rates_above_two_bits_are_the_papers(bits: int) -> None:
    config, _ = resolve_config(build_config({"model": "m", "bits": bits}), context=None, scheme=None)
    assert (config.lr_weight, config.lr_e2e) == (1e-5, 1e-5)


def test_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    preset = demo_preset()
    file = yaml_file(tmp_path, "samples: 11\nbatch: 5\n")
    config = build_config({"samples": 7, "batch": None}, file)
    assert (config.samples, config.batch, config.seq_len) == (7, 5, preset["seq_len"])


def test_the_demo_preset_is_for_runs_without_a_model_only(tmp_path: Path) -> None:
    assert build_config({}).samples == demo_preset()["samples"]
    assert build_config({"model": "m"}).samples == 4096
    assert build_config({}, yaml_file(tmp_path, "model: m")).samples == 4096


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": "é/m", "lr_weight": 3e-7, "eval_tokens": 5, "max_grad_norm": float("inf")}
    config, _ = resolve_config(build_config(given), context=512, scheme=None)
    save_config(config, tmp_path / "saved.yaml")
    assert build_config({}, tmp_path / "saved.yaml") == config


def test_permission_to_overwrite_is_not_saved(tmp_path: Path) -> None:
    save_config(build_config({"model": "m", "force": True}), tmp_path / "saved.yaml")
    assert read_config(tmp_path / "saved.yaml").keys() <= NAMES - {"force"}
    assert build_config({}, tmp_path / "saved.yaml").force is False


def test_numbers_that_yaml_reads_as_text_or_integers_become_floats(tmp_path: Path) -> None:
    values = read_config(yaml_file(tmp_path, "lr_weight: 2e-5\nlr_scale: 1\nmax_grad_norm: inf\nshard_size: 1000"))
    assert values == {"lr_weight": 2e-5, "lr_scale": 1.0, "max_grad_norm": float("inf"), "shard_size": "1000"}
    assert isinstance(values["lr_scale"], float)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert build_config({"model": "m"}, yaml_file(tmp_path, "# nothing\n")) == build_config({"model": "m"})


BAD_SETTINGS = {
    "sample: 3": "unknown name 'sample'; the nearest is 'samples'",
    "seq-len: 3": "unknown name 'seq-len'; the nearest is 'seq_len'",
    "bits: 5": "bits is 5; allowed are 2, 3, 4, 8",
    "group: 0": r"group is 0; allowed are -1 \(one group a row\) and positive integers",
    "stage: e2e": "stage is 'e2e'; allowed are all, block-ap, e2e-qp",
    "samples: 0": "samples is 0; allowed are numbers from 1",
    "samples: 2.5": "samples is 2.5; expected an integer",
    "samples: true": "samples is True; expected an integer",
    "lr_weight: fast": "lr_weight is 'fast'; expected a number",
    "lr_weight: .nan": "lr_weight is nan; allowed are numbers from 0",
    "lr_e2e: 0": "lr_e2e is 0.0; allowed are numbers above 0",
    "warmup_ratio: 1.5": "warmup_ratio is 1.5; allowed are numbers from 0 to 1",
    "force: 1": "force is 1; expected true or false",
    "data: [a, b]": r"data is \['a', 'b'\]; expected text",
    "- samples": "holds a list; expected lines of name: value",
    "samples: {": "is not YAML",
}


@pytest.mark.parametrize("text", BAD_SETTINGS)
def test_wrong_settings_are_refused_in_one_line_with_value_and_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=BAD_SETTINGS[text]) as caught:
        read_config(yaml_file(tmp_path, text))
    assert "settings.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_values_on_the_command_line_name_the_option() -> None:
    with pytest.raises(InputError, match="--e2e-batch is 0; allowed are numbers from 1"):
        build_config({"model": "m", "e2e_batch": 0})


def test_a_missing_settings_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml"):
        build_config({}, tmp_path / "absent.yaml")


def test_default_lengths_are_cut_to_the_context_with_a_note_and_chosen_ones_are_refused() -> None:
    config, notes = resolve_config(build_config({"model": "m"}), context=512, scheme=None)
    assert (config.seq_len, config.e2e_seq_len) == (512, 512)
    assert len(notes) == 2 and all("512" in note for note in notes)
    with pytest.raises(InputError, match="--seq-len is 513; the model's context is 512 tokens"):
        resolve_config(build_config({"model": "m", "seq_len": 513}), context=512, scheme=None)
    with pytest.raises(InputError, match="--e2e-seq-len is 1024"):
        resolve_config(build_config({"model": "m", "e2e_seq_len": 1024}), context=512, scheme=None)


def test_scales_alone_keep_the_checkpoints_scheme() -> None:
    scheme = QuantScheme(3, 128)
    config, _ = resolve_config(build_config({"model": "m", "stage": "e2e-qp"}), context=None, scheme=scheme)
    assert (config.bits, config.group, config.lr_e2e) == (3, 128, 1e-5)
    with pytest.raises(InputError, match=r"bits 2 and group 128.*checkpoint is w3g128"):
        resolve_config(build_config({"model": "m", "bits": 2}), context=None, scheme=scheme)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr_weight", math.inf, "--lr-weight is inf; allowed are finite numbers"),
        ("weight_decay", math.inf, "--weight-decay is inf; allowed are finite numbers"),
        ("seed", 2**63, r"--seed is 9223372036854775808; allowed are integers from 0 to 2\*\*62"),
        ("model", "", "MODEL is empty; give a value or leave it out"),
        ("data", " ", "--data is empty; give a value or leave it out"),
        ("out", "", "--out is empty; give a value or leave it out"),
    ],
)
def test_values_that_later_steps_cannot_take_are_refused_at_once(name: str, value: object, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        build_config({name: value})


def test_an_empty_prompt_and_no_clipping_are_values_too() -> None:
    config = build_config({"prompt": "", "max_grad_norm": math.inf})
    assert config.prompt == "" and config.max_grad_norm == math.inf


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ["--seq-len is 128", "--e2e-seq-len is 128"]),
        ({"stage": "block-ap"}, ["--seq-len is 128"]),
        ({"stage": "e2e-qp"}, ["--e2e-seq-len is 128"]),
        ({"stage": "e2e-qp", "eval_data": "a.txt"}, ["--seq-len is 128", "--e2e-seq-len is 128"]),
    ],
)
def test_only_lengths_that_the_run_uses_are_remarked_on(changed: dict[str, str], expected: list[str]) -> None:
    config = build_config({"model": "m", **changed})
    _, notes = resolve_config(config, context=128, scheme=None)
    assert [note.partition(",")[0] for note in notes] == expected
