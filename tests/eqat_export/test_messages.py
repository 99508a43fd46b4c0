"""What a newcomer reads when something is rounded, mislabelled, missing or narrow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.report import exactness_lines
from formats import errors


def test_four_bit_mlx_says_how_to_round_less(eqat: Callable, native: Callable[..., Path]) -> None:
    outcome = eqat("export", native(bits=4), "--to", "mlx")
    assert "ROUNDED: 14 of 14 layers" in outcome.out and "; --scale-dtype float32 rounds less" in outcome.out
    outcome = eqat("export", "native", "--to", "mlx", "--force", "--scale-dtype", "float32")
    assert "ROUNDED" not in outcome.out and "rounds less" not in outcome.out


def test_nothing_is_called_exact_that_was_rounded_on_reading(native: Callable[..., Path], tmp_path: Path) -> None:
    convert(native(bits=4), tmp_path / "mlx", "mlx")
    lines = exactness_lines(convert(tmp_path / "mlx", tmp_path / "out", "gptq_v2"))
    assert lines[0].startswith("ROUNDED on reading: 14 of 14 layers, where mlx has rounded products")
    assert lines[1].startswith("then written as read: codes, zeros and scales bit for bit in 14")
    assert not [line for line in lines if line.startswith("exact")]


@pytest.mark.parametrize("asked", ["awq", "mlx", "gguf", "onnx", "compressed-tensors"])
def test_a_wrong_from_names_the_label_and_the_way_out(eqat: Callable, native: Callable[..., Path], asked: str) -> None:
    outcome = eqat("export", native(bits=4), "--from", asked, "--to", "gptq", "--out", "out")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert "is labelled native" in outcome.err and f"read as {asked}" in outcome.err
    assert outcome.err.endswith("leave --from out\n")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_missing_file_is_said_to_be_missing(eqat: Callable, command: str) -> None:
    outcome = eqat(command, "nothere.gguf")
    assert (outcome.code, outcome.err) == (
        2,
        "error: nothere.gguf does not exist; give a .gguf file or a checkpoint folder\n",
    )


@pytest.mark.parametrize("engine", ["llama.cpp", "mlx"])
def test_an_engines_verdict_names_the_format_and_not_only_its_label(
    eqat: Callable, native: Callable[..., Path], tmp_path: Path, engine: str
) -> None:
    convert(native(bits=4), tmp_path / "out", "bitblas")
    outcome = eqat("verify", tmp_path / "out", "--for", engine)
    assert "the format bitblas" in outcome.out


@pytest.mark.parametrize("columns", [40, 100])
def test_a_comparison_drops_no_column_on_a_narrow_terminal(
    eqat: Callable, native: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    source = native(scale_dtype=torch.float32)
    convert(source, tmp_path / "out", "gptq_v2")
    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = eqat("verify", tmp_path / "out", "--against", source)
    assert outcome.code == 0
    for title in ("max error", "of bound", "rel. L2"):
        assert title in outcome.out


def test_a_missing_extra_is_installed_from_where_eqat_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(errors.__file__).resolve().parents[1]
    monkeypatch.chdir(tmp_path)
    assert str(errors.MissingExtraError("gguf", "gguf", "this")).endswith(f"pip install '{root}[gguf]'")
    monkeypatch.chdir(root)
    assert str(errors.MissingExtraError("gguf", "gguf", "this")).endswith("pip install '.[gguf]'")
