"""What inspect shows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from eqat_export import report
from eqat_export.inspect import inspect_checkpoint
from formats.model import open_checkpoint

UP = "model.layers.0.mlp.up_proj"


def test_sizes_and_bits_per_weight_add_up(eqat: Callable, native: Callable[..., Path]) -> None:
    folder = native(bits=2, group_size=32)
    found = json.loads(eqat("inspect", folder, "--json").out)
    # two layers of q, o: 64 x 64; k, v: 32 x 64; gate, up: 128 x 64; down: 64 x 128
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    part = found["parts"]["quantized linears"]
    assert part["parameters"] == weights
    # codes 2 bits; fp16 scale and 2-bit zero a group of 32; g_idx int32 an input feature
    g_idx = 2 * 32 * (6 * 64 + 128)
    assert part["bytes"] * 8 == weights * 2 + weights // 32 * 18 + g_idx
    assert part["bits_per_weight"] == pytest.approx(part["bytes"] * 8 / weights)
    assert found["parts"]["embeddings, head"]["parameters"] == 2 * 257 * 64
    assert found["parts"]["norms, biases"]["parameters"] == 5 * 64
    assert found["bytes"] == sum(part["bytes"] for part in found["parts"].values())
    assert found["schemes"] == {"w2g32": 14}


@pytest.mark.parametrize("bits", [2, 8])
def test_histograms_count_every_group(eqat: Callable, native: Callable[..., Path], bits: int) -> None:
    folder = native(bits=bits)
    found = json.loads(eqat("inspect", folder, "--layer", UP, "--json").out)
    with open_checkpoint(folder) as checkpoint:
        layer = checkpoint.layer(UP)
    assert sum(found["zeros"].values()) == layer.zeros.numel() == sum(found["scales_log2"].values())
    assert found["zeros"]["0"] == int((layer.zeros == 0).sum())
    assert sum(found["codes"].values()) == layer.codes.numel()
    for exponent, count in found["scales_log2"].items():
        low = 2.0 ** int(exponent)
        assert count == int(((layer.scales.float() >= low) & (layer.scales.float() < 2 * low)).sum())


def test_an_unknown_layer_is_answered_with_close_ones(eqat: Callable, native: Callable[..., Path]) -> None:
    outcome = eqat("inspect", native(), "--layer", "up_proj")
    assert outcome.code == 2
    assert UP in outcome.err and len(outcome.err.splitlines()) == 1


def test_full_precision_models_show_sizes_only(eqat: Callable, dense_models: Callable[[str], Path]) -> None:
    outcome = eqat("inspect", dense_models("gemma2"))
    assert outcome.code == 0
    assert "full precision" in outcome.out and "other linears" in outcome.out
    assert "zeros" not in outcome.out


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("layer", [None, UP])
@pytest.mark.parametrize("bits", [2, 8])
def test_no_line_is_wider_than_the_terminal(
    native: Callable[..., Path], width: int, layer: str | None, bits: int
) -> None:
    with open_checkpoint(native(bits=bits)) as checkpoint:
        inspection = inspect_checkpoint(checkpoint, layer)
    stream = io.StringIO()
    report.show_inspection(inspection, Console(file=stream, width=width, force_terminal=False))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum("█" in line for line in lines) >= 3
    assert "\x1b" not in stream.getvalue()


def test_a_stream_without_block_characters_gets_ascii(native: Callable[..., Path]) -> None:
    with open_checkpoint(native()) as checkpoint:
        inspection = inspect_checkpoint(checkpoint)
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    report.show_inspection(inspection, Console(file=stream, width=80))
    stream.flush()
    assert b"###" in raw.getvalue()
