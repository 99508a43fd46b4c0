"""Packed layers against unpacked ones, and word regrouping against Python integers."""

import pytest
import torch

from formats import QuantizedLinear, dequantize, pack_bits
from formats.errors import InvalidLayerError
from formats.packed import PackedLinear
from formats.packing import restream
from formats.types import QuantScheme

SHAPES = [(64, 128, 32), (24, 96, -1), (8, 70, 10), (5, 33, 16)]  # out, in, group


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES)
class TestPacking:
    @pytest.fixture
    def layer(self, make_layer, bits, shape) -> QuantizedLinear:
        out_features, in_features, group_size = shape
        return make_layer(bits, group_size, out_features, in_features, bias=True)

    def test_the_words_of_a_row_are_its_codes_as_one_integer(self, layer, bits) -> None:
        packed = PackedLinear.pack(layer)
        for row in (0, layer.out_features - 1):
            stream = sum(int(code) << (bits * k) for k, code in enumerate(layer.codes[row]))
            words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(packed.words.shape[0])]
            assert [int(word) & 0xFFFFFFFF for word in packed.words[:, row]] == words
            assert stream >> (32 * len(words)) == 0

    def test_unpacking_gives_the_layer_back(self, layer) -> None:
        found = PackedLinear.pack(layer).unpack()
        for name in ("codes", "scales", "zeros", "bias"):
            assert torch.equal(getattr(found, name), getattr(layer, name)), name
        assert found.scheme == layer.scheme

    def test_complementing_keeps_the_weights_and_the_padding(self, layer) -> None:
        where = torch.rand(layer.scales.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        found = PackedLinear.pack(layer).complement(where)
        assert torch.equal(dequantize(found.unpack()), dequantize(layer))
        assert torch.equal(found.words, PackedLinear.pack(layer.complement(where)).words)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_complementing_follows_the_order_of_groups(make_layer, bits) -> None:
    layer = make_layer(bits, 32, act_order=True)
    where = layer.zeros == 0
    assert torch.equal(dequantize(PackedLinear.pack(layer).complement(where).unpack()), dequantize(layer))


@pytest.mark.parametrize("used", [4, 25, 27, 30, 31, 32])
@pytest.mark.parametrize("target", [4, 25, 30, 32])
@pytest.mark.parametrize("length", [1, 60, 480, 511])
def test_restreaming_keeps_the_stream_and_drops_what_is_not_of_it(used, target, length) -> None:
    generator = torch.Generator().manual_seed(length)
    count = -(-length // used)
    words = torch.randint(-(2**31), 2**31, (count, 3), generator=generator).to(torch.int32)
    before = words.clone()
    found = restream(words, length, used, target)
    assert torch.equal(words, before)
    for column in range(3):
        stream = sum((int(word) & ((1 << used) - 1)) << (used * i) for i, word in enumerate(words[:, column]))
        stream &= (1 << length) - 1
        expected = [(stream >> (target * i)) & ((1 << target) - 1) for i in range(-(-length // target))]
        assert [int(word) & 0xFFFFFFFF for word in found[:, column]] == expected


def test_ten_values_a_word_become_a_dense_stream() -> None:
    codes = torch.randint(0, 8, (7, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    fixed, dense = pack_bits(codes, 3, axis=1, per_word=10).T, pack_bits(codes, 3, axis=1).T
    assert torch.equal(restream(fixed, 288, 30, 32), dense)
    assert torch.equal(restream(dense, 288, 32, 30), fixed)


def test_a_wrong_count_of_words_is_refused() -> None:
    with pytest.raises(ValueError, match="take 9 int32"):
        restream(torch.zeros(8, 2, dtype=torch.int32), 270, 30, 32)
    with pytest.raises(InvalidLayerError, match="2 words a row; 32 codes of 4 bits take 4"):
        PackedLinear(torch.zeros(2, 3, dtype=torch.int32), torch.ones(3, 1), torch.zeros(3, 1), QuantScheme(4, 32), 32)
