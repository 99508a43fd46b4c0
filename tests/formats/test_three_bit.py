"""The three 3-bit layouts are told apart by rows, and by codes where rows coincide."""

import pytest
import torch

from formats import QuantScheme, round_to_nearest
from formats.packing import pack_bits
from formats.three_bit import layout_by_shape, layout_by_values, planar_codes

ROWS, COLUMNS = 96, 256


@pytest.mark.parametrize(
    ("rows", "in_features", "layouts"),
    [
        (72, 768, ("dense", "planar")),  # 3 * 768 / 32
        (77, 768, ("native",)),  # ceil(768 / 10)
        (3, 32, ("dense", "planar")),
        (4, 32, ("native",)),
        (10, 100, ("native",)),
        (10, 101, ()),
    ],
)
def test_rows_tell_the_layout(rows, in_features, layouts) -> None:
    assert layout_by_shape(rows, in_features) == layouts


def planar(codes: torch.Tensor) -> torch.Tensor:
    """gptqmodel's own packer on codes ``[out, in]``."""
    packing = pytest.importorskip("gptqmodel.utils.planar_packing", reason="gptqmodel is not installed")
    return packing.planar_pack_rows(codes.T.to(torch.int32), 3)


def dense(codes: torch.Tensor) -> torch.Tensor:
    return pack_bits(codes, 3, axis=1).T.contiguous()


def groups(group_size: int) -> torch.Tensor:
    return torch.arange(COLUMNS) // (COLUMNS if group_size == -1 else group_size)


def weights(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    uniform = torch.rand(ROWS, COLUMNS, generator=generator) - 0.5
    return {
        "normal": normal,
        "heavy tails": normal / torch.randn(ROWS, COLUMNS, generator=generator).abs().sqrt(),
        "laplace": normal.sign() * (uniform + 0.5).log(),
        "one sign": normal.abs(),
        "uniform": uniform,
        "skewed": normal.exp(),
    }[kind]


def test_planar_codes_are_gptqmodels() -> None:
    codes = torch.randint(0, 8, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(planar_codes(planar(codes), COLUMNS), codes)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "laplace", "one sign"])
def test_codes_of_weights_tell_dense_from_planar(kind, group_size) -> None:
    codes = round_to_nearest(weights(kind), QuantScheme(3, group_size)).codes
    assert layout_by_values(dense(codes), groups(group_size)) == "dense"
    assert layout_by_values(planar(codes), groups(group_size)) == "planar"


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("kind", ["uniform", "skewed"])
def test_unusual_weights_are_never_taken_for_the_other_layout(kind, group_size) -> None:
    codes = round_to_nearest(weights(kind), QuantScheme(3, group_size)).codes
    assert layout_by_values(dense(codes), groups(group_size)) in (None, "dense")
    assert layout_by_values(planar(codes), groups(group_size)) in (None, "planar")


@pytest.mark.parametrize("levels", [(0, 7), (0, 5), (3, 4), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_codes_that_are_no_weights_say_nothing_wrong(levels) -> None:
    drawn = torch.randint(0, len(levels), (ROWS, COLUMNS), generator=torch.Generator().manual_seed(1))
    codes = torch.tensor(levels, dtype=torch.uint8)[drawn]
    assert layout_by_values(dense(codes), groups(64)) in (None, "dense")


def test_few_codes_say_nothing() -> None:
    codes = round_to_nearest(weights("normal")[:4], QuantScheme(3, 64)).codes
    assert layout_by_values(dense(codes), groups(64)) is None
