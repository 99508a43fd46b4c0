"""Words to words: fields are moved, widened and added to without being unpacked.

Everything here is shifts and masks of int32 words, elementwise, so that several values are treated in one operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["add_to_fields_", "permute_blocks_", "permute_fields", "restream", "widen_fields"]

_WORD_BITS = 32
_CHUNK = 2**16  # words that stay in a core's cache through several operations


def restream(words: Tensor, length: int, used: int, target: int) -> Tensor:
    """The same bit stream with another count of bits in each word, along the first axis.

    Args:
        words: int32 ``[ceil(length / used), ...]``; bits from ``used`` upwards, and past the stream's end, are ignored.
        length: bits of the stream.
        used: bits of the stream a word of ``words`` holds, 1 to 32.
        target: the same for the result.

    Returns:
        int32 ``[ceil(length / target), ...]``, unused bits 0; ``words`` itself where nothing changes.

    Raises:
        ValueError: words are not int32, or not as many as the stream takes.
    """
    count = math.ceil(length / used)
    if words.dtype != torch.int32 or words.shape[0] != count:
        raise ValueError(
            f"words are {words.dtype} {list(words.shape)}; {length} bits, {used} a word, take {count} int32"
        )
    tail = length - (count - 1) * used
    if tail < _WORD_BITS and (used == target or tail < used):
        last = _field(words[-1:], 0, tail)
        if not torch.equal(last, words[-1:]):
            words = torch.cat([words[:-1], last])
    if used == target:
        return words if used == 32 else _field(words, 0, used)
    run = math.lcm(used, target)
    rows_in, rows_out, whole = run // used, run // target, count * used // run
    result = words.new_empty(math.ceil(length / run) * rows_out, *words.shape[1:])
    step = max(1, _CHUNK * 16 // max(1, rows_in * words[0].numel()))  # larger pieces than elsewhere: many operations
    for start in range(0, whole, step):
        some = slice(start, min(start + step, whole))
        _restream_periods(
            words[some.start * rows_in : some.stop * rows_in].unflatten(0, (-1, rows_in)),
            used,
            result[some.start * rows_out : some.stop * rows_out].unflatten(0, (-1, rows_out)),
            target,
        )
    rest = words[whole * rows_in :]
    if len(rest):
        padded = torch.cat([rest, words.new_zeros(rows_in - len(rest), *words.shape[1:])])
        _restream_periods(padded[None], used, result[whole * rows_out :][None, :rows_out], target)
    return result[: math.ceil(length / target)]


def _restream_periods(source: Tensor, used: int, result: Tensor, target: int) -> None:
    """``restream`` of whole periods ``[periods, words, ...]``, with every bit from ``used`` upwards ignored."""
    if used < _WORD_BITS:
        source = source & (2**used - 1)
    moved = torch.empty_like(result[:, 0])
    for j in range(result.shape[1]):
        for i in range(j * target // used, math.ceil((j + 1) * target / used)):
            distance = i * used - j * target  # upwards; what leaves the word on either side is lost
            if distance >= 0:
                torch.bitwise_left_shift(source[:, i], distance, out=moved)
            else:
                torch.bitwise_right_shift(source[:, i], -distance, out=moved)
                if used == _WORD_BITS:
                    moved.bitwise_and_(2 ** (used + distance) - 1)  # copies of the sign bit
            if i * used <= j * target:
                result[:, j] = moved
            else:
                result[:, j] |= moved
    if target < _WORD_BITS:
        result &= 2**target - 1


def permute_fields(words: Tensor, bits: int, positions: Sequence[int]) -> Tensor:
    """Moves the fields of every word to other places in the same word.

    Args:
        words: int32 tensor of any shape.
        bits: bits a field; must divide 32.
        positions: for each of the ``32 // bits`` fields, lowest first, the index of the field it becomes.

    Returns:
        int32 tensor of the same shape, contiguous.

    Raises:
        ValueError: words are not int32, bits does not divide 32, or positions is no permutation of the fields.
    """
    if words.dtype != torch.int32:
        raise ValueError(f"words are {words.dtype}; permute_fields takes int32")
    if not 1 <= bits <= 8 or 32 % bits:
        raise ValueError(f"bits is {bits}; fields of 1, 2, 4 or 8 bits fill a word of 32")
    if sorted(positions) != list(range(32 // bits)):
        raise ValueError(f"positions are {list(positions)}; expected each of 0..{32 // bits - 1} once")
    order = _index_bit_order(positions)
    if order is not None:
        result = words.clone(memory_format=torch.contiguous_format)
        flat = result.view(-1)
        for start in range(0, flat.numel(), _CHUNK):
            _permute_index_bits_(flat[start : start + _CHUNK], bits, order, [])
        return result
    targets: dict[int, int] = {}  # distance in bits, upwards -> mask of the fields that land there
    for field, position in enumerate(positions):
        distance = (position - field) * bits
        targets[distance] = targets.get(distance, 0) | (2**bits - 1) << position * bits
    source = words.contiguous()
    result, moved = torch.zeros_like(source), torch.empty_like(source)
    for distance, mask in targets.items():
        shift = torch.bitwise_left_shift if distance >= 0 else torch.bitwise_right_shift
        shift(source, abs(distance), out=moved)
        moved.bitwise_and_(_signed(mask))  # the mask also clears copies of the sign bit
        result.bitwise_or_(moved)
    return result


def permute_blocks_(words: Tensor, bits: int, order: Sequence[int], axis: int = 0) -> Tensor:
    """Moves fields between the words of a block: field ``i`` of the result is field ``j`` of the block.

    Fields are counted through the block, lowest first in each word; bit ``k`` of ``i`` is bit ``order[k]`` of ``j``. A
    transposition of eight words of eight fields is ``(3, 4, 5, 0, 1, 2)``.

    Args:
        words: int32, ``axis`` of it a block's words, a power of two; contents are overwritten.
        bits: bits a field; 1, 2, 4 or 8.
        order: for each bit of a field's index in the result, lowest first, which bit of it in the block.
        axis: where a block's words are.

    Returns:
        int32 of the shape of words; their memory, where it need not be reordered.

    Raises:
        ValueError: words are not int32, or order is no permutation of the index bits.
    """
    count = words.shape[axis]
    bits_outside, bits_inside = (count - 1).bit_length(), (32 // bits - 1).bit_length()
    if sorted(order) != list(range(bits_inside + bits_outside)) or 2**bits_outside != count:
        raise ValueError(f"order is {list(order)}; it does not fit {count} words of {bits}-bit fields")
    if words.dtype != torch.int32:
        raise ValueError(f"words are {words.dtype}; permute_blocks_ takes int32")
    if not bits_outside:
        _permute_index_bits_(words, bits, order, [])
        return words
    split = words.unflatten(axis, [2] * bits_outside)  # an axis for each bit of a word's place
    axes = [axis + bits_outside - 1 - k for k in range(bits_outside)]
    moved = _permute_index_bits_(split, bits, order, axes)
    last = [*range(axis), *reversed(moved), *range(axis + bits_outside, split.dim())]
    return split.permute(last).flatten(axis, axis + bits_outside - 1)


def widen_fields(words: Tensor, bits: int, count: int, target: int) -> Tensor:
    """The same values in wider fields, along the first axis.

    Args:
        words: int32 ``[ceil(count * bits / 32), ...]``, a dense stream.
        bits: 1 to 4.
        count: values of the stream, a multiple of 8.
        target: 4 or 8, more than ``bits``.

    Returns:
        int32 ``[count * target / 32, ...]``, a dense stream of wider fields.

    Raises:
        ValueError: the widths or the count are impossible, or words are not as many as the stream takes.
    """
    if not (1 <= bits <= 4 and target in (4, 8) and bits < target) or count % 8:
        raise ValueError(f"{count} fields of {bits} bits do not become {target} bits wide; eights of 1 to 4 bits do")
    eights = restream(words, count * bits, 32, 8 * bits)  # eight values a word
    if eights is words:
        eights = words.clone()
    spread = eights.new_empty(count // 8, target // 4, *words.shape[1:])
    if target == 8:
        torch.bitwise_right_shift(eights, 4 * bits, out=spread[:, 1])
        spread[:, 1].bitwise_and_(2 ** (4 * bits) - 1)
        torch.bitwise_and(eights, 2 ** (4 * bits) - 1, out=spread[:, 0])
        run = 2
    else:
        spread[:, 0] = eights
        run = 4
    moved = torch.empty_like(spread)
    while run:  # runs of so many values stand together; the upper one of each two moves up
        torch.bitwise_left_shift(spread, run * (target - bits), out=moved)
        low = sum((2 ** (run * bits) - 1) << at * target for at in range(0, 32 // target, 2 * run))
        spread.bitwise_and_(low)
        spread.bitwise_or_(moved.bitwise_and_(_signed(low << run * target)))
        run //= 2
    return spread.flatten(0, 1)


def add_to_fields_(words: Tensor, addends: Tensor) -> Tensor:
    """Adds numbers to 4-bit fields modulo 16, in place, and says which sums were 16 or more.

    Args:
        words: int32 ``[words, ...]`` of eight fields each; they become the sums.
        addends: int32, 0 to 16, broadcastable to words; all fields of a word get the same.

    Returns:
        int32 of the shape of words: bit ``i``, of eight, tells of field ``i``.
    """
    spread = addends * 0x01010101
    odd = ((words >> 4) & 0x0F0F0F0F).add_(spread)
    words.bitwise_and_(0x0F0F0F0F).add_(spread)
    over = (words >> 4).bitwise_and_(0x01010101)
    over.bitwise_or_((odd >> 3).bitwise_and_(0x02020202))  # two bits a byte, of four
    over.bitwise_or_(over >> 6).bitwise_and_(0x000F000F)
    over.bitwise_or_(over >> 12).bitwise_and_(0xFF)
    words.bitwise_and_(0x0F0F0F0F).bitwise_or_(odd.bitwise_and_(0x0F0F0F0F).bitwise_left_shift_(4))
    return over


def _index_bit_order(positions: Sequence[int]) -> list[int] | None:
    """Which bit of a field's index each bit of its new index was; None where a permutation is not one of index bits."""
    count = int(math.log2(len(positions)))
    powers = [positions[2**k] for k in range(count)]
    if list(positions) != [sum(powers[k] for k in range(count) if field >> k & 1) for field in range(2**count)]:
        return None
    return [powers.index(2**k) for k in range(count)]


def _permute_index_bits_(words: Tensor, bits: int, order: Sequence[int], axes: Sequence[int]) -> list[int]:
    """See ``permute_blocks_``. Two index bits are exchanged at a time, which moves half of the fields past the others.

    Args:
        words: int32, overwritten.
        bits: bits a field.
        order: as there.
        axes: axes of length 2 that are the bits of a word's place, lowest first.

    Returns:
        the same for the result.
    """
    inside = (32 // bits - 1).bit_length()
    now, axes = list(range(len(order))), list(axes)  # which bit of the index in the block stands where
    for low in range(len(order)):
        high = now.index(order[low])
        if high == low:
            continue
        now[low], now[high] = now[high], now[low]
        fields = range(2**inside)
        if high < inside:
            mask = _mask(bits, [field for field in fields if field >> low & 1 and not field >> high & 1])
            distance = bits * (2**high - 2**low)
            moved = (words >> distance).bitwise_xor_(words).bitwise_and_(_signed(mask))
            words.bitwise_xor_(moved).bitwise_xor_(moved.bitwise_left_shift_(distance))
        elif low < inside:
            mask, distance = _mask(bits, [field for field in fields if not field >> low & 1]), bits * 2**low
            first, second = words.select(axes[high - inside], 0), words.select(axes[high - inside], 1)
            moved = (first >> distance).bitwise_xor_(second).bitwise_and_(_signed(mask))
            second.bitwise_xor_(moved)
            first.bitwise_xor_(moved.bitwise_left_shift_(distance))
        else:
            one, other = low - inside, high - inside
            axes[one], axes[other] = axes[other], axes[one]
    return axes


def _mask(bits: int, fields: Iterable[int]) -> int:
    """The word in which all bits of the given fields are set."""
    return sum((2**bits - 1) << bits * field for field in fields)


def _signed(mask: int) -> int:
    """A word of 32 bits as int32 has it."""
    return mask - 2**32 if mask >= 2**31 else mask


def _field(words: Tensor, low: int, width: int) -> Tensor:
    """Bits ``low .. low+width-1`` of int32 words, as non-negative numbers unless they are all 32."""
    return words if width == 32 else (words >> low) & ((1 << width) - 1)
