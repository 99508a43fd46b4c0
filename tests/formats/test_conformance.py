"""The proof fails on every kind of difference."""

from dataclasses import replace

import pytest

from formats import get_format
from formats.conformance import compare, round_trip

NATIVE = get_format("native")


def changed(layer, field: str, index: tuple[int, ...], value):
    tensor = getattr(layer, field).clone()
    tensor[index] = value
    return replace(layer, **{field: tensor})


def test_an_unchanged_layer_passes(make_layer) -> None:
    layer = make_layer(4, 32, bias=True, act_order=True)
    found = round_trip(layer, NATIVE)
    assert found.ok
    assert (found.codes_equal, found.zeros_equal, found.scales_equal, found.bias_equal) == (True, True, True, True)
    assert found.max_abs_weight_error == 0
    assert found.bound == 0


@pytest.mark.parametrize(
    ("field", "index", "flag"),
    [
        ("codes", (3, 5), "codes_equal"),
        ("zeros", (3, 1), "zeros_equal"),
        ("scales", (3, 1), "scales_equal"),
        ("bias", (3,), "bias_equal"),
    ],
)
def test_one_changed_value_fails(make_layer, field, index, flag) -> None:
    layer = make_layer(4, 32, bias=True)
    other = changed(layer, field, index, getattr(layer, field)[index] + (-1 if getattr(layer, field)[index] > 0 else 1))
    found = compare(layer, other, NATIVE)
    assert not found.ok
    assert getattr(found, flag) is False
    if field != "bias":
        assert found.max_abs_weight_error > 0
        assert found.worst[0] == 3


def test_another_order_fails(make_layer) -> None:
    layer = make_layer(4, 32, act_order=True)
    found = compare(layer, replace(layer, g_idx=layer.g_idx.roll(1)), NATIVE)
    assert not found.ok
    assert found.codes_equal


def test_a_lost_bias_fails(make_layer) -> None:
    layer = make_layer(4, 32, bias=True)
    found = compare(layer, replace(layer, bias=None), NATIVE)
    assert not found.ok
    assert not found.bias_equal


def test_another_shape_fails(make_layer) -> None:
    found = compare(make_layer(4, 32, 64), make_layer(4, 32, 96), NATIVE)
    assert not found.ok
    assert found.max_abs_weight_error == float("inf")


def test_the_same_weights_by_other_codes_pass_only_where_allowed(make_layer) -> None:
    layer = make_layer(4, 32)
    other = layer.complement(layer.zeros == 0)
    assert not compare(layer, other, NATIVE).ok
    found = compare(layer, other, get_format("gptq"))
    assert found.ok
    assert found.codes_equal is False


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_fails(make_layer, value) -> None:
    layer, fmt = make_layer(4, 32), get_format("dense", dtype="float32")
    weight = fmt.encode(layer)["weight"].clone()
    weight[2, 9] = value
    found = compare(layer, weight, fmt)
    assert not found.ok
    assert found.worst == (2, 9)
