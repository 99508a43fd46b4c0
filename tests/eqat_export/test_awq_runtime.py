"""AWQ exports in gptqmodel, by itself and through transformers, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
pytest.importorskip("gptqmodel", reason="needs gptqmodel: pip install 'eqat[gptq]'")

from eqat_export.convert import convert
from eqat_export.runtime_check import check_runtime
from eqat_export.runtimes import get_runtime
from eqat_export.verify import verify_checkpoint
from formats.errors import UnsupportedSchemeError
from formats.model import open_checkpoint
from tests.tiny_checkpoints import leave_out, mix

RUNTIMES = ["gptqmodel", "transformers"]


def proof(folder: Path, runtime: str) -> tuple[bool, list[str]]:
    with open_checkpoint(folder) as checkpoint:
        result = check_runtime(checkpoint, get_runtime(runtime))
    return result.ok, result.lines()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_exports_run(native: Callable[..., Path], tmp_path: Path, architecture: str, runtime: str) -> None:
    convert(native(bits=4, architecture=architecture), tmp_path / "awq", "awq")
    ok, said = proof(tmp_path / "awq", runtime)
    assert ok, said


def test_a_layer_of_its_own_scheme_is_refused_before_anything_is_written(
    native: Callable[..., Path], tmp_path: Path
) -> None:
    base = native(bits=4)
    mix(base, native("other", bits=4, group_size=64), tmp_path / "mixed", "model.layers.1.mlp.up_proj")
    with pytest.raises(UnsupportedSchemeError, match=r"layer model\.layers\.1\.mlp\.up_proj is w4g64 in a w4g32 model"):
        convert(tmp_path / "mixed", tmp_path / "awq", "awq")
    assert not (tmp_path / "awq").exists()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_linear_in_full_precision_stays_so(native: Callable[..., Path], tmp_path: Path, runtime: str) -> None:
    part = leave_out(native(bits=4), tmp_path / "part", "model.layers.0.mlp.down_proj")
    convert(part, tmp_path / "out", "awq")
    ok, said = proof(tmp_path / "out", runtime)
    assert ok, said
    with open_checkpoint(tmp_path / "out") as checkpoint:
        findings = verify_checkpoint(checkpoint)
    assert not [finding for finding in findings if finding.severity != "note"], findings
