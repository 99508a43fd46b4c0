"""A checkpoint whose layers have settings of their own, in every format and in the real readers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.runtime_check import check_runtime
from eqat_export.runtimes import get_runtime
from formats import QuantScheme, available_formats, dequantize, get_format
from formats.errors import UnsupportedSchemeError
from formats.model import open_checkpoint
from tests.tiny_checkpoints import quantize_folder

# Readers compute q, k and v as one; the last two of each block are in full precision.
OTHERS: dict[str, QuantScheme | None] = {
    **{f"model.layers.{i}.mlp.down_proj": QuantScheme(4, 64) for i in (0, 1)},
    **{f"model.layers.1.self_attn.{name}_proj": QuantScheme(4, 32) for name in "qkv"},
    **{f"model.layers.{i}.self_attn.o_proj": None for i in (0, 1)},
}
KEPT = {"lm_head", *(name for name, scheme in OTHERS.items() if scheme is None)}
ONE_SCHEME = {
    "bitblas": (2, "readers of bitblas build every layer with the model's bits and group_size"),
    "awq": (4, "awq has one bits and one group_size"),
}
READERS = [
    ("gptq", "gptqmodel", "gptqmodel"),
    ("gptq_v2", "gptqmodel", "gptqmodel"),
    ("mlx", "mlx", "mlx_lm"),
    ("onnx", "onnxruntime", "onnxruntime"),
    ("gguf", "llama.cpp", "llama_cpp"),
    ("auto-round", "auto-round", "auto_round"),
]


@pytest.fixture
def varied(dense_models: Callable[[str], Path], tmp_path: Path) -> Path:
    """At 2 bits in groups of 32, but for ``OTHERS``."""
    return quantize_folder(dense_models("llama"), tmp_path / "varied", QuantScheme(2, 32), schemes=OTHERS)


def exported(source: Path, format_id: str) -> Path:
    return convert(source, source.with_name(f"out{get_format(format_id).suffix}"), format_id).out


@pytest.mark.parametrize("format_id", [name for name in available_formats() if name not in ONE_SCHEME])
def test_every_layer_keeps_its_settings(varied: Path, format_id: str) -> None:
    if format_id in ("onnx", "gguf"):
        pytest.importorskip(format_id)
    if format_id == "native":
        pytest.skip("it is what the others are made of")
    with open_checkpoint(varied) as before, open_checkpoint(exported(varied, format_id)) as after:
        if not get_format(format_id).readable:
            assert not after.layer_names
            return
        assert after.scheme is not None and (after.scheme.bits, after.scheme.group_size) == (2, 32)
        assert set(after.ignore) == KEPT and set(after.layer_names) == set(before.layer_names)
        for name in before.layer_names:
            scheme, own = after.layer(name).scheme, before.layer(name).scheme
            assert (scheme.bits, scheme.group_size) == (own.bits, own.group_size), name
            assert torch.equal(after.layer(name).codes, before.layer(name).codes) or torch.equal(
                dequantize(after.layer(name)), dequantize(before.layer(name))
            )


@pytest.mark.parametrize("format_id", ONE_SCHEME)
def test_a_format_of_one_scheme_refuses_by_name(
    dense_models: Callable[[str], Path], tmp_path: Path, format_id: str
) -> None:
    bits, says = ONE_SCHEME[format_id]
    others = {"model.layers.1.mlp.down_proj": QuantScheme(bits, 64)}
    source = quantize_folder(dense_models("llama"), tmp_path / "varied", QuantScheme(bits, 32), schemes=others)
    with pytest.raises(UnsupportedSchemeError, match=says) as refused:
        exported(source, format_id)
    assert "model.layers.1.mlp.down_proj" in str(refused.value) and "gptq" in str(refused.value)


@pytest.mark.parametrize(("format_id", "runtime", "package"), READERS, ids=[row[0] for row in READERS])
def test_real_readers_compute_with_every_layers_own_settings(
    varied: Path, format_id: str, runtime: str, package: str
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    with open_checkpoint(exported(varied, format_id)) as checkpoint:
        found = check_runtime(checkpoint, get_runtime(runtime))
    assert found.ok and found.layers == 12, found.lines()
