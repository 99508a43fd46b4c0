"""The command line itself: start-up, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eqat_export.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_help_answers_in_half_a_second() -> None:
    """Of a core's time: how many others use the cores is not the command's doing."""
    times = []
    for _ in range(3):
        began = os.times()
        outcome = command("--help")
        ended = os.times()
        times.append(ended.children_user + ended.children_system - began.children_user - began.children_system)
        assert outcome.returncode == 0
    assert 0 < min(times) < 0.5, times
    for name in ("export", "verify", "inspect", "formats", "Exit codes"):
        assert name in outcome.stdout


def test_importing_the_command_loads_nothing_heavy() -> None:
    code = "import sys, eqat_export.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "typer" in loaded
    assert not {"torch", "transformers", "numpy", "safetensors", "datasets", "accelerate", "formats"} & set(loaded)


def test_exit_codes_of_the_real_process(native: Callable[..., Path], tmp_path: Path) -> None:
    source = native()
    assert command("export", source, "--to", "gptq", "--out", tmp_path / "out").returncode == 0
    assert command("verify", tmp_path / "out", "--against", source).returncode == 0
    other = native("other", group_size=64)
    assert command("verify", tmp_path / "out", "--against", other).returncode == 1
    missing = command("verify", tmp_path / "nowhere")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: ") and len(missing.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export",), "Missing option '--to'"),
        (("export", "--to"), "--to"),
        (("bake",), "No such command 'bake'"),
        (("inspect",), "CHECKPOINT"),
    ],
)
def test_usage_errors_are_one_line_with_exit_code_2(eqat: Callable, arguments: tuple[str, ...], message: str) -> None:
    outcome = eqat(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert message in outcome.err and "--help" in outcome.err
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1


def test_an_option_that_the_format_does_not_have_says_which_it_has(eqat: Callable) -> None:
    outcome = eqat("export", "--to", "gguf", "--colour", "red")
    assert (outcome.code, outcome.out) == (2, "")
    assert "has no option --colour; gguf takes --gguf-type" in outcome.err and "eqat formats gguf" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_format_of_one_file_wants_its_suffix(eqat: Callable, native: Callable, tmp_path: Path) -> None:
    outcome = eqat("export", native(), "--to", "gguf", "--out", tmp_path / "out")
    assert outcome.code == 2 and "gguf is one file, named *.gguf" in outcome.err


@pytest.mark.parametrize("arguments", [("--debug", "inspect", "nowhere"), ("inspect", "nowhere", "--debug")])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(eqat: Callable, arguments: tuple[str, ...]) -> None:
    outcome = eqat(*arguments)
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")


def test_no_arguments_show_the_help(eqat: Callable) -> None:
    outcome = eqat()
    assert outcome.code == 0
    assert "Usage: eqat" in outcome.out


def test_version_is_printed(eqat: Callable) -> None:
    outcome = eqat("--version")
    assert outcome.code == 0
    assert outcome.out.startswith("eqat")


def test_a_reader_that_goes_away_is_no_error(native: Callable[..., Path]) -> None:
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run(
        [sys.executable, "-m", "eqat_export.cli", "inspect", str(native())],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (child.returncode, child.stderr) == (141, "")


def test_an_unwritable_history_is_a_warning(eqat: Callable, native: Callable[..., Path], tmp_path: Path) -> None:
    Path(".eqat").write_text("a file where the folder should be")
    outcome = eqat("export", native(), "--to", "gptq", "--out", tmp_path / "out")
    assert outcome.code == 0
    assert "warning: .eqat" in outcome.err
    assert (tmp_path / "out" / "config.json").exists()


def test_formats_are_listed_with_what_they_take(eqat: Callable) -> None:
    rows = {row["id"]: row for row in json.loads(eqat("formats", "--json").out)["formats"]}
    assert rows["native"]["bits"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows["gptq"]["bits"] == [2, 3, 4, 8]
    assert rows["gptq_v2"]["groups"] == [32, 64, 128, -1]
    assert rows["native"]["exactness"] == "exact"
    assert rows["gptq"]["exactness"] == "exact weights (fp32 scales: rounded)"
    assert rows["gptq_v2"]["exactness"] == "exact (fp32 scales: rounded)"
    assert rows["dense"]["direction"] == "write"
    assert rows["gptq"]["readers"] == ["gptqmodel", "transformers"]
    assert rows["gptq"]["extra"] == "gptq"
    shown = eqat("formats").out
    for name in rows:
        assert f"\n{name}" in f"\n{shown}"
    assert "\x1b" not in shown


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_table_of_formats_fits_the_terminal(eqat: Callable, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = eqat("formats")
    assert all(len(line) <= columns for line in outcome.out.splitlines())
    for word in ("gptqmodel", "transformers", "rounded"):  # whole, not folded in the middle
        assert word in outcome.out
