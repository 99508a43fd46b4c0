"""Dequantized weights are rounded once, to the dtype asked for."""

from dataclasses import replace

import pytest
import torch

from formats import Exactness, dequantize, get_format
from formats.conformance import compare, round_trip
from formats.errors import CheckpointError, InputError, UnsupportedSchemeError
from formats.types import QuantScheme

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES.values())
@pytest.mark.parametrize("bits", [2, 8])
def test_weight_is_the_formula_rounded_once(make_layer, name, scale_dtype, bits) -> None:
    layer = make_layer(bits, 32, scale_dtype=scale_dtype, bias=True)
    fmt = get_format("dense", dtype=name)
    tensors = fmt.encode(layer)
    exact = (layer.codes.double() - layer.zeros[:, layer.group_index()]) * layer.scales[:, layer.group_index()].double()
    assert torch.equal(tensors["weight"], exact.float().to(DTYPES[name]))
    assert torch.equal(tensors["bias"], layer.bias.to(DTYPES[name]))
    found = round_trip(layer, fmt)
    assert found.ok
    assert found.codes_equal is None
    if name == "float32":
        assert found.exactness is Exactness.EXACT_WEIGHTS


def test_a_weight_off_by_one_unit_fails(make_layer) -> None:
    layer, fmt = make_layer(4, 32, scale_dtype=torch.float32), get_format("dense")
    weight = fmt.encode(layer)["weight"]
    weight.view(torch.int16)[5, 7] += 1
    found = compare(layer, weight, fmt)
    assert found.exactness is Exactness.ROUNDED
    assert not found.ok
    assert found.worst == (5, 7)


def test_overflow_is_refused_with_a_way_out(make_layer) -> None:
    layer = make_layer(8, 32, scale_dtype=torch.float32)
    layer = replace(layer, scales=layer.scales * 1e6)
    with pytest.raises(UnsupportedSchemeError, match="overflows float16; use bfloat16 or float32"):
        get_format("dense").encode(layer)
    assert torch.isfinite(get_format("dense", dtype="bfloat16").encode(layer)["weight"]).all()


@pytest.mark.parametrize("dtype", ["int8", "float64", torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype) -> None:
    with pytest.raises(InputError, match="allowed are float16, bfloat16, float32"):
        get_format("dense", dtype=dtype)


def test_dense_is_written_and_never_decoded(make_layer) -> None:
    fmt = get_format("dense", dtype=torch.bfloat16)
    assert not fmt.readable
    assert fmt.model_dtype() is torch.bfloat16
    assert fmt.quantization_config(QuantScheme(2, 64)) == {}
    assert not fmt.detect({}, ["a.weight"])
    assert torch.equal(fmt.encode(make_layer())["weight"], dequantize(make_layer()).bfloat16())
    with pytest.raises(CheckpointError, match="no codes"):
        fmt.decode({}, QuantScheme(2, 64))
    with pytest.raises(CheckpointError, match="no quantization scheme"):
        fmt.parse_config({})
