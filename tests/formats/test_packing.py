"""Packing against Python's big integers: a stream is one long number, low bits first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formats import pack_bits, unpack_bits
from formats.packing import add_to_fields_, packed_length, permute_blocks_, permute_fields, widen_fields

CONTAINERS = {torch.int8: 8, torch.uint8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}


def words_of_integer(number: int, words: int, word_bits: int, *, signed: bool) -> list[int]:
    found = [(number >> (word_bits * i)) & (2**word_bits - 1) for i in range(words)]
    return [word - 2**word_bits if signed and word >> (word_bits - 1) else word for word in found]


def packed_by_integers(values: list[int], bits: int, container: torch.dtype, per_word: int | None) -> list[int]:
    word_bits = CONTAINERS[container]
    signed = container is not torch.uint8
    if per_word is None:
        number = sum(value << (bits * i) for i, value in enumerate(values))
        return words_of_integer(number, -(-len(values) * bits // word_bits), word_bits, signed=signed)
    runs = [values[i : i + per_word] for i in range(0, len(values), per_word)]
    numbers = (sum(value << (bits * i) for i, value in enumerate(run)) for run in runs)
    return [words_of_integer(number, 1, word_bits, signed=signed)[0] for number in numbers]


def packed_line_by_line(values: Tensor, bits: int, axis: int, container: torch.dtype, per_word: int | None) -> Tensor:
    lines = values.movedim(axis, -1)
    flat = [packed_by_integers(line.tolist(), bits, container, per_word) for line in lines.reshape(-1, lines.shape[-1])]
    return torch.tensor(flat, dtype=container).view(*lines.shape[:-1], -1).movedim(-1, axis)


@st.composite
def packings(draw: st.DrawFn) -> tuple[Tensor, int, int, torch.dtype, int | None]:
    bits = draw(st.integers(1, 8))
    container = draw(st.sampled_from(list(CONTAINERS)))
    per_word = draw(st.none() | st.integers(1, CONTAINERS[container] // bits))
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=2))
    axis = draw(st.integers(0, len(shape)))
    shape.insert(axis, draw(st.integers(1, 77)))
    fill = draw(st.sampled_from(["random", "zeros", "ones"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    if fill != "random":
        values.fill_(0 if fill == "zeros" else 2**bits - 1)
    return values, bits, draw(st.sampled_from([axis, axis - len(shape)])), container, per_word


@settings(max_examples=300, deadline=None)
@given(packings())
def test_packs_like_one_big_integer_and_comes_back(case: tuple[Tensor, int, int, torch.dtype, int | None]) -> None:
    values, bits, axis, container, per_word = case
    packed = pack_bits(values, bits, axis, container=container, per_word=per_word)
    assert packed.dtype is container
    assert torch.equal(packed, packed_line_by_line(values, bits, axis, container, per_word))
    assert packed.shape[axis] == packed_length(values.shape[axis], bits, container, per_word)
    assert torch.equal(unpack_bits(packed, bits, values.shape[axis], axis, per_word=per_word), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_garbage_in_unused_bits_is_not_read(bits: int) -> None:
    per_word = 32 // bits
    values = torch.randint(0, 2**bits, (3, per_word + 1), dtype=torch.uint8)
    packed = pack_bits(values, bits, per_word=per_word)
    packed[:, -1] |= -(2**bits)  # everything above the one value of the last word
    assert torch.equal(unpack_bits(packed, bits, per_word + 1, per_word=per_word), values)


def test_inputs_are_not_changed_and_may_be_views() -> None:
    values = torch.randint(0, 8, (20, 64), dtype=torch.uint8)
    before = values.clone()
    packed = pack_bits(values[::2, 1::3].T, 3, axis=0)
    kept = packed.clone()
    assert torch.equal(unpack_bits(packed, 3, 21, axis=0), values[::2, 1::3].T)
    assert torch.equal(values, before)
    assert torch.equal(packed, kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": torch.zeros(4, dtype=torch.int32), "bits": 2}, "takes uint8"),
        ({"values": torch.tensor([4], dtype=torch.uint8), "bits": 2}, "does not fit in 2 bits"),
        ({"values": torch.zeros(4, dtype=torch.uint8), "bits": 0}, "allowed are 1 to 8"),
        ({"values": torch.zeros(4, dtype=torch.uint8), "bits": 9}, "allowed are 1 to 8"),
        ({"values": torch.zeros(4, dtype=torch.uint8), "bits": 3, "container": torch.float32}, "container is"),
        ({"values": torch.zeros(4, dtype=torch.uint8), "bits": 3, "per_word": 11}, "do not fit in a word"),
    ],
)
def test_impossible_packings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_bits(**arguments)


def test_unpacking_refuses_the_wrong_number_of_words() -> None:
    with pytest.raises(ValueError, match="take 2"):
        unpack_bits(torch.zeros(3, dtype=torch.int32), 3, 20)


@given(bits=st.sampled_from([1, 2, 4, 8]), data=st.data())
def test_fields_go_where_they_are_sent(bits, data) -> None:
    positions = data.draw(st.permutations(range(32 // bits)))
    numbers = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5))
    expected = [
        sum(((number >> bits * i) & (2**bits - 1)) << bits * place for i, place in enumerate(positions))
        for number in numbers
    ]
    found = permute_fields(torch.tensor(numbers, dtype=torch.int32)[:, None], bits, positions)
    assert [number & 0xFFFFFFFF for number in found[:, 0].tolist()] == expected


@pytest.mark.parametrize(
    ("dtype", "bits", "positions", "said"),
    [
        (torch.int64, 4, range(8), "takes int32"),
        (torch.int32, 3, range(10), "bits is 3"),
        (torch.int32, 8, [0, 1, 2, 2], "expected each of 0..3 once"),
    ],
)
def test_a_permutation_of_fields_that_is_none_is_refused(dtype, bits, positions, said) -> None:
    with pytest.raises(ValueError, match=said):
        permute_fields(torch.zeros(2, dtype=dtype), bits, positions)


def numbers(words: torch.Tensor) -> list[int]:
    return [number & 0xFFFFFFFF for number in words.flatten().tolist()]


def fields_of(words: list[int], bits: int) -> list[int]:
    return [word >> bits * i & (2**bits - 1) for word in words for i in range(32 // bits)]


@given(bits=st.sampled_from([1, 2, 4, 8]), extra=st.integers(0, 3), data=st.data())
def test_fields_move_within_a_block_as_the_bits_of_their_index_do(bits, extra, data) -> None:
    count = (32 // bits).bit_length() - 1 + extra
    order = data.draw(st.permutations(range(count)))
    words = torch.tensor(data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2**extra, max_size=2**extra)))
    words = words.to(torch.int32)
    before = fields_of(numbers(words), bits)
    found = permute_blocks_(words[:, None].repeat(1, 3), bits, order)
    again = permute_blocks_(words[None, :, None].repeat(2, 1, 3), bits, order, axis=1)
    assert torch.equal(again, found.expand(2, -1, -1))
    after = fields_of(numbers(found[:, 2]), bits)
    expected = [before[sum((i >> k & 1) << order[k] for k in range(count))] for i in range(2**count)]
    assert after == expected


@pytest.mark.parametrize("target", [4, 8])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [8, 40, 96])
def test_wider_fields_hold_the_same_values(bits, count, target) -> None:
    if bits == target or count * target % 32:
        return
    values = torch.randint(0, 2**bits, (count, 3), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    words = pack_bits(values, bits, axis=0)
    before = words.clone()
    found = widen_fields(words, bits, count, target)
    for column in range(3):
        assert fields_of(numbers(found[:, column]), target) == values[:, column].tolist()
    assert torch.equal(words, before)


def test_adding_to_fields_tells_which_overflow() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (40, 6), generator=generator).to(torch.int32)
    addends = torch.randint(0, 17, (10, 1, 6), generator=generator).to(torch.int32)
    before = [fields_of([number], 4) for number in numbers(words)]
    sums = [
        [v + a for v in fields] for fields, a in zip(before, addends.repeat(1, 4, 1).flatten().tolist(), strict=True)
    ]
    over = add_to_fields_(words.view(10, 4, 6), addends)
    assert [fields_of([number], 4) for number in numbers(words)] == [[v % 16 for v in fields] for fields in sums]
    assert over.flatten().tolist() == [sum((v >= 16) << i for i, v in enumerate(fields)) for fields in sums]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: permute_blocks_(torch.zeros(2, 1, dtype=torch.int32), 4, (0, 1, 2)), "does not fit 2 words"),
        (lambda: permute_blocks_(torch.zeros(3, 1, dtype=torch.int32), 4, (0, 1, 2, 3, 4)), "does not fit 3 words"),
        (lambda: permute_blocks_(torch.zeros(1), 4, (0, 1, 2)), "takes int32"),
        (lambda: widen_fields(torch.zeros(5, dtype=torch.int32), 5, 32, 8), "do not become 8 bits wide"),
        (lambda: widen_fields(torch.zeros(1, dtype=torch.int32), 3, 10, 4), "do not become 4 bits wide"),
        (lambda: widen_fields(torch.zeros(2, dtype=torch.int32), 4, 8, 8), "take 1 int32"),
    ],
)
def test_impossible_moves_of_fields_are_refused(call, said) -> None:
    with pytest.raises(ValueError, match=said):
        call()
