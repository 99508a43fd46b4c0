"""auto-round exports in auto-round itself, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("auto_round", reason="needs auto-round: pip install 'eqat[auto-round]'")

from eqat_export.convert import convert
from eqat_export.runtime_check import check_runtime
from eqat_export.runtimes import get_runtime
from eqat_export.verify import verify_checkpoint
from formats.model import open_checkpoint
from tests.tiny_checkpoints import leave_out, mix


def proof(folder: Path) -> tuple[bool, list[str]]:
    with open_checkpoint(folder) as checkpoint:
        result = check_runtime(checkpoint, get_runtime("auto-round"))
    return result.ok, result.lines()


@pytest.mark.parametrize(("bits", "architecture"), [(2, "llama"), (3, "qwen2"), (4, "qwen3"), (8, "llama")])
def test_exports_run_in_auto_round(native: Callable[..., Path], tmp_path: Path, bits: int, architecture: str) -> None:
    convert(native(bits=bits, architecture=architecture), tmp_path / "ar", "auto-round")
    ok, said = proof(tmp_path / "ar")
    assert ok, said


def test_a_layer_of_its_own_scheme_runs(native: Callable[..., Path], tmp_path: Path) -> None:
    up = "model.layers.1.mlp.up_proj"
    mixed = mix(native(bits=2), native("other", bits=4, group_size=64), tmp_path / "mixed", up)
    convert(mixed, tmp_path / "ar", "auto-round")
    ok, said = proof(tmp_path / "ar")
    assert ok, said


def test_a_model_that_auto_round_made_runs_as_we_read_it(
    dense_models: Callable[[str], Path], tmp_path: Path, eqat: Callable
) -> None:
    script = Path(__file__).with_name("auto_round_model.py")
    arguments = [str(dense_models("llama")), str(tmp_path / "made"), "4", "False", "auto_round:gptqmodel"]
    made = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    [folder] = (tmp_path / "made").iterdir()  # it makes a folder of its own inside
    ok, said = proof(folder)
    assert ok, said
    assert eqat("export", folder, "--to", "gptq_v2", "--out", tmp_path / "v2").code == 0
    assert (folder / "quantization_config.json").exists()
    assert not (tmp_path / "v2" / "quantization_config.json").exists()
    outcome = eqat("verify", tmp_path / "v2", "--against", folder)
    assert outcome.code == 0, outcome.out + outcome.err


def test_a_linear_in_full_precision_stays_so(native: Callable[..., Path], tmp_path: Path) -> None:
    convert(
        leave_out(native(bits=4), tmp_path / "part", "model.layers.0.mlp.down_proj"), tmp_path / "out", "auto-round"
    )
    ok, said = proof(tmp_path / "out")
    assert ok, said
    with open_checkpoint(tmp_path / "out") as checkpoint:
        findings = verify_checkpoint(checkpoint)
    assert not [finding for finding in findings if finding.severity != "note"], findings
