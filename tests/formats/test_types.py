"""Nothing out of range gets into a canonical layer."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from formats import QuantizedLinear, QuantScheme, dequantize
from formats.errors import InvalidLayerError


@pytest.mark.parametrize("bits", [0, 9, -1, True, 2.0, "4", None])
def test_bits_outside_1_to_8_are_refused(bits) -> None:
    with pytest.raises(InvalidLayerError, match="bits is"):
        QuantScheme(bits, 64)


@pytest.mark.parametrize("group_size", [0, -2, True, 64.0, "64", None])
def test_group_size_is_minus_one_or_positive(group_size) -> None:
    with pytest.raises(InvalidLayerError, match="group_size is"):
        QuantScheme(4, group_size)


def test_scheme_counts_groups_and_reads_well() -> None:
    assert QuantScheme(3, 64).groups(100) == 2
    assert QuantScheme(3, -1).groups(100) == 1
    assert QuantScheme(2, 128).groups(64) == 1
    assert str(QuantScheme(2, 64)) == "w2g64"
    assert str(QuantScheme(4, -1, sym=True, desc_act=True)) == "w4g-1 sym desc_act"


BAD_FIELDS = {
    "codes above maxq": ({"codes": torch.full((64, 128), 16, dtype=torch.uint8)}, "codes span"),
    "codes of another dtype": ({"codes": torch.zeros(64, 128, dtype=torch.int32)}, "codes are"),
    "codes with one axis": ({"codes": torch.zeros(64, dtype=torch.uint8)}, "codes are"),
    "no codes": ({"codes": torch.zeros(0, 128, dtype=torch.uint8)}, "non-empty"),
    "zeros above maxq": ({"zeros": torch.full((64, 4), 16, dtype=torch.int32)}, "zeros span"),
    "negative zeros": ({"zeros": torch.full((64, 4), -1, dtype=torch.int32)}, "zeros span"),
    "floating zeros": ({"zeros": torch.zeros(64, 4)}, "zeros are"),
    "zeros of another shape": ({"zeros": torch.zeros(64, 3, dtype=torch.int32)}, "zeros have shape"),
    "NaN scale": ({"scales": torch.full((64, 4), float("nan"))}, "finite"),
    "infinite scale": ({"scales": torch.full((64, 4), float("inf"))}, "finite"),
    "float64 scales": ({"scales": torch.ones(64, 4, dtype=torch.float64)}, "scales are"),
    "transposed scales": ({"scales": torch.ones(4, 64)}, "scales have shape"),
    "bias of another length": ({"bias": torch.zeros(128)}, "bias have shape"),
    "integer bias": ({"bias": torch.zeros(64, dtype=torch.int32)}, "bias are"),
    "g_idx without desc_act": ({"g_idx": torch.zeros(128, dtype=torch.int32)}, "contradict"),
    "desc_act without g_idx": ({"scheme": QuantScheme(4, 32, desc_act=True)}, "contradict"),
    "sym with other zeros": ({"scheme": QuantScheme(4, 32, sym=True)}, "sym is set"),
    "group out of range": (
        {"scheme": QuantScheme(4, 32, desc_act=True), "g_idx": torch.full((128,), 4, dtype=torch.int32)},
        "g_idx span",
    ),
    "short g_idx": (
        {"scheme": QuantScheme(4, 32, desc_act=True), "g_idx": torch.zeros(4, dtype=torch.int32)},
        "g_idx have shape",
    ),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_layers_are_refused(make_layer, case) -> None:
    fields, message = BAD_FIELDS[case]
    with pytest.raises(InvalidLayerError, match=message):
        replace(make_layer(4, 32), **fields)


def test_layers_are_frozen(make_layer) -> None:
    with pytest.raises(FrozenInstanceError):
        make_layer().codes = torch.zeros(1, 1, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("in_features", [128, 70])
def test_complement_keeps_every_weight(make_layer, bits, act_order, in_features) -> None:
    layer = make_layer(bits, 32, 16, in_features, act_order=act_order, scale_dtype=torch.float32)
    where = torch.rand(layer.zeros.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    other = layer.complement(where)
    assert torch.equal(dequantize(other), dequantize(layer))
    assert torch.equal(other.zeros[where], layer.scheme.maxq - layer.zeros[where])
    assert torch.equal(other.scales[~where], layer.scales[~where])


def test_complementing_a_symmetric_layer_clears_sym() -> None:
    scheme = QuantScheme(4, -1, sym=True)
    layer = QuantizedLinear(
        torch.ones(2, 8, dtype=torch.uint8), torch.ones(2, 1), torch.full((2, 1), 8, dtype=torch.int32), scheme
    )
    assert not layer.complement(torch.tensor([[True], [False]])).scheme.sym
    assert layer.complement(torch.tensor([[False], [False]])).scheme.sym
