"""AWQ exports in gptqmodel, on the CPU."""

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
from formats.errors import UnsupportedSchemeError
from formats.model import open_checkpoint
from tests.tiny_checkpoints import mix


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_exports_run_in_gptqmodel(native: Callable[..., Path], tmp_path: Path, architecture: str) -> None:
    convert(native(bits=4, architecture=architecture), tmp_path / "awq", "awq")
    with open_checkpoint(tmp_path / "awq") as checkpoint:
        result = check_runtime(checkpoint, get_runtime("gptqmodel"))
    assert result.ok, result.lines()


def test_a_layer_of_its_own_scheme_is_refused_before_anything_is_written(
    native: Callable[..., Path], tmp_path: Path
) -> None:
    base = native(bits=4)
    mix(base, native("other", bits=4, group_size=64), tmp_path / "mixed", "model.layers.1.mlp.up_proj")
    with pytest.raises(UnsupportedSchemeError, match=r"layer model\.layers\.1\.mlp\.up_proj is w4g64 in a w4g32 model"):
        convert(tmp_path / "mixed", tmp_path / "awq", "awq")
    assert not (tmp_path / "awq").exists()
