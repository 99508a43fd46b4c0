"""Rounding measured from groups and codes equals what every single weight says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eqat_export import code_rounding
from eqat_export.code_rounding import measure_codes
from eqat_export.rounding import Rounding
from formats import QuantizedLinear, QuantScheme
from formats.dense import DenseFormat
from formats.errors import CheckpointError
from formats.packed import PackedLinear


def layer(bits: int, group_size: int, low: int, high: int, *, columns: int = 256) -> QuantizedLinear:
    """Codes from ``low`` to ``high`` only, scales over five powers of two."""
    scheme, draw = QuantScheme(bits, group_size), torch.Generator().manual_seed(bits)
    groups = scheme.groups(columns)
    codes = torch.randint(low, high + 1, (48, columns), generator=draw).to(torch.uint8)
    scales = (2.0 ** (torch.rand(48, groups, generator=draw) * 5 - 8)).half()
    scales[:, 0] *= -1
    zeros = torch.randint(0, scheme.maxq + 1, (48, groups), generator=draw).int()
    return QuantizedLinear(codes, scales, zeros, scheme)


def expected(found: QuantizedLinear, dtype: torch.dtype) -> tuple[float, float]:
    """Largest absolute and relative difference over all weights, by numpy."""
    width = found.in_features // found.groups
    scales = np.repeat(found.scales.numpy().astype(np.float32), width, axis=1)
    exact = (found.codes.numpy().astype(np.float32) - np.repeat(found.zeros.numpy(), width, axis=1)) * scales
    exact = exact.astype(np.float32)
    stored = torch.from_numpy(exact).to(dtype).float().numpy()
    difference = np.abs(stored - exact)
    share = np.divide(difference, np.abs(exact), out=np.zeros_like(exact), where=exact != 0)
    return float(difference.max()), float(share.max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "group_size", "low", "high"), [(2, 32, 0, 3), (3, 64, 0, 7), (4, 64, 5, 9), (4, -1, 0, 15)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_worst_of_all_weights_is_found(
    bits: int, group_size: int, low: int, high: int, dtype: torch.dtype, packed: bool
) -> None:
    found, rounding = layer(bits, group_size, low, high), Rounding()
    form = DenseFormat(dtype)
    assert measure_codes(form, "a", PackedLinear.pack(found) if packed else found, dtype, rounding)
    error, share = expected(found, dtype)
    assert (rounding.tensors, rounding.where) == (1, "a")
    assert rounding.error == error and rounding.relative == pytest.approx(share, rel=1e-6)
    assert 0 < rounding.error <= rounding.bound <= 2 * rounding.error


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    found, whole, parts = layer(4, 64, 2, 13), Rounding(), Rounding()
    form = DenseFormat(torch.float16)
    assert measure_codes(form, "a", found, torch.float16, whole)
    monkeypatch.setattr(code_rounding, "_TABLE", 200)
    assert measure_codes(form, "a", found, torch.float16, parts)
    assert vars(whole) == vars(parts)


def test_what_it_cannot_tell_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_rounding, "_TRIES", 2)
    form, rounding = DenseFormat(torch.float16), Rounding()
    few = layer(4, 64, 7, 7)  # most entries of the table do not occur
    assert not measure_codes(form, "a", few, torch.float16, rounding)
    assert not measure_codes(form, "a", layer(4, 16, 0, 15), torch.float16, rounding)
    assert not measure_codes(form, "a", layer(4, 64, 0, 15, columns=224), torch.float16, rounding)
    assert rounding == Rounding()


def test_a_value_beyond_the_dtype_is_an_error() -> None:
    found = layer(4, 64, 0, 15)
    huge = QuantizedLinear(found.codes, found.scales.float() * 1e7, found.zeros, found.scheme)
    with pytest.raises(CheckpointError, match="cannot be stored as float16"):
        measure_codes(DenseFormat(torch.float16), "a", huge, torch.float16, Rounding())
