"""The one bit packer.

Values of ``bits`` bits are laid along one axis into a little-endian stream, low bits first. Two layouts exist in
the field, and one parameter tells them apart:

- dense (``per_word=None``): value ``i`` occupies stream bits ``i*bits .. (i+1)*bits - 1`` and may straddle a word
  boundary. GPTQ, compressed-tensors and MLX pack this way.
- a fixed count a word (``per_word=n``): each word holds ``n`` values and its remaining high bits stay zero.
  EfficientQAT packs 3-bit this way, ten values a word.

``restream`` goes from one to the other without unpacking: ten 3-bit values are 30 bits of the same stream.

The stream is built bytewise in uint8 arithmetic and then viewed as the container, so no intermediate is larger than
the values themselves. The last word is padded with zero bits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "add_to_fields_",
    "pack_bits",
    "packed_length",
    "permute_blocks_",
    "permute_fields",
    "restream",
    "unpack_bits",
    "widen_fields",
]

_CHUNK = 2**16  # words that stay in a core's cache through several operations
_CONTAINER_BITS = {torch.int8: 8, torch.uint8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}

if sys.byteorder != "little":
    raise ImportError("eqat packs little-endian words by viewing bytes; this machine is big-endian")


def packed_length(count: int, bits: int, container: torch.dtype = torch.int32, per_word: int | None = None) -> int:
    """Words that ``count`` values take."""
    word = _word_bits(bits, container, per_word)
    return math.ceil(count / per_word) if per_word else math.ceil(count * bits / word)


def pack_bits(
    values: Tensor, bits: int, axis: int = -1, *, container: torch.dtype = torch.int32, per_word: int | None = None
) -> Tensor:
    """Packs unsigned integers along one axis.

    Args:
        values: uint8 tensor of any shape, every value below ``2 ** bits``.
        bits: 1 to 8.
        axis: axis along which values become words.
        container: dtype of the words: int8, uint8, int16, int32 or int64.
        per_word: None for a dense stream, else the fixed count of values a word.

    Returns:
        ``container`` tensor whose ``axis`` has ``packed_length(values.shape[axis], ...)`` words.

    Raises:
        ValueError: values are not uint8, one does not fit in ``bits``, or the layout is impossible.
    """
    word_bits = _word_bits(bits, container, per_word)
    if values.dtype != torch.uint8:
        raise ValueError(f"values are {values.dtype}; pack_bits takes uint8")
    if bits < 8 and values.numel() and int(values.max()) >= 2**bits:
        raise ValueError(f"value {int(values.max())} does not fit in {bits} bits")
    count = values.shape[axis]
    words = packed_length(count, bits, container, per_word)
    period, period_bytes = _period(bits, word_bits, per_word)
    runs, rest = divmod(word_bits // 8, period_bytes)
    if axis % values.dim() == 0 and values.dim() > 1 and not rest:
        return _pack_down(values, bits, container, runs * period, words)
    periods = math.ceil(words * word_bits / 8 / period_bytes)
    padding = periods * period - count
    rows = values.movedim(axis, -1)
    if padding:
        rows = torch.nn.functional.pad(rows, (0, padding))
    source = rows.reshape(*rows.shape[:-1], periods, period)
    stream = source.new_zeros(*rows.shape[:-1], periods, period_bytes)  # [..., periods, bytes] uint8
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        stream[..., byte] |= source[..., i] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= source[..., i] >> (8 - shift)
    stream = stream.flatten(-2)[..., : words * word_bits // 8]
    return _view_as(stream, container).movedim(-1, axis).contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int, axis: int = -1, *, per_word: int | None = None) -> Tensor:
    """Inverse of :func:`pack_bits`.

    Args:
        packed: integer words; the container is the tensor's dtype.
        bits: 1 to 8.
        count: values along ``axis`` after unpacking.
        axis: axis along which words become values.
        per_word: None for a dense stream, else the fixed count of values a word.

    Returns:
        uint8 values, ``count`` of them along ``axis``.

    Raises:
        ValueError: the axis does not have exactly the words that ``count`` values take.
    """
    word_bits = _word_bits(bits, packed.dtype, per_word)
    words = packed_length(count, bits, packed.dtype, per_word)
    if packed.shape[axis] != words:
        raise ValueError(f"axis {axis} has {packed.shape[axis]} words; {count} values of {bits} bits take {words}")
    stream = _view_as(packed.movedim(axis, -1), torch.uint8)  # [..., bytes]
    period, period_bytes = _period(bits, word_bits, per_word)
    periods = math.ceil(stream.shape[-1] / period_bytes)
    missing = periods * period_bytes - stream.shape[-1]
    if missing:
        stream = torch.nn.functional.pad(stream, (0, missing))
    source = stream.reshape(*stream.shape[:-1], periods, period_bytes)
    values = source.new_empty(*stream.shape[:-1], periods, period)
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        value = source[..., byte] >> shift
        if shift + bits > 8:
            value = value | (source[..., byte + 1] << (8 - shift))
        values[..., i] = value & (2**bits - 1)
    return values.flatten(-2)[..., :count].movedim(-1, axis).contiguous()


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
    if tail < _CONTAINER_BITS[torch.int32] and (used == target or tail < used):
        last = _field(words[-1:], 0, tail)
        if not torch.equal(last, words[-1:]):
            words = torch.cat([words[:-1], last])
    if used == target:
        return words if used == 32 else _field(words, 0, used)
    run = math.lcm(used, target)
    periods = math.ceil(length / run)
    padding = words.new_zeros(periods * run // used - count, *words.shape[1:])
    source = torch.cat([words, padding]) if len(padding) else words
    source = source.unflatten(0, (periods, run // used))
    result = source.new_empty(periods, run // target, *words.shape[1:])
    step = max(1, _CHUNK // max(1, words[0].numel()))  # pieces of a word's rows stay in cache
    for start in range(0, periods, step):
        _restream_periods(source[start : start + step], used, result[start : start + step], target)
    return result.flatten(0, 1)[: math.ceil(length / target)]


def _restream_periods(source: Tensor, used: int, result: Tensor, target: int) -> None:
    """``restream`` of whole periods ``[periods, words, ...]``, with every bit from ``used`` upwards ignored."""
    for j in range(result.shape[1]):
        for i in range(j * target // used, math.ceil((j + 1) * target / used)):
            start, end = max(i * used, j * target), min((i + 1) * used, (j + 1) * target)
            piece = _field(source[:, i], start - i * used, end - start)
            if start == j * target:
                result[:, j] = piece
            else:
                result[:, j] |= piece << (start - j * target)


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
            _permute_index_bits_([flat[start : start + _CHUNK]], bits, order)
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


def permute_blocks_(words: Sequence[Tensor], bits: int, order: Sequence[int]) -> list[Tensor]:
    """Moves fields between the words of a block, in place: field ``i`` of the result is field ``j`` of the block.

    Fields are counted through the block, lowest first in each word; bit ``k`` of ``j`` is bit ``order.index(k)`` of
    ``i``. A transposition of eight words of eight fields is ``(3, 4, 5, 0, 1, 2)``.

    Args:
        words: a power of two of int32 tensors of one shape, the words of many blocks; they are overwritten.
        bits: bits a field; 1, 2, 4 or 8.
        order: for each bit of a field's index in the result, lowest first, which bit it was.

    Returns:
        the words of the result: the tensors given, perhaps in another order.

    Raises:
        ValueError: words are not int32, or order is no permutation of the index bits.
    """
    count = int(math.log2(32 // bits)) + int(math.log2(len(words)))
    if sorted(order) != list(range(count)) or 2**count != len(words) * (32 // bits):
        raise ValueError(f"order is {list(order)}; {len(words)} words of {bits}-bit fields take each of 0..{count - 1}")
    if any(word.dtype != torch.int32 for word in words):
        raise ValueError("permute_blocks_ takes int32 words")
    return _permute_index_bits_(list(words), bits, order)


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


def _permute_index_bits_(words: list[Tensor], bits: int, order: Sequence[int]) -> list[Tensor]:
    """See ``permute_blocks_``. Exchanges two index bits at a time, each by one exchange of masked fields."""
    inside = int(math.log2(32 // bits))
    now = list(range(len(order)))  # which bit of the original index stands where
    moved, kept = torch.empty_like(words[0]), torch.empty_like(words[0])
    for low in range(len(order)):
        high = now.index(order[low])
        if high == low:
            continue
        now[low], now[high] = now[high], now[low]
        if high < inside:
            mask = _mask(bits, [field for field in range(2**inside) if field >> low & 1 and not field >> high & 1])
            distance = bits * (2**high - 2**low)
            for word in words:
                torch.bitwise_right_shift(word, distance, out=moved)
                moved.bitwise_xor_(word).bitwise_and_(_signed(mask))
                word.bitwise_xor_(moved).bitwise_xor_(moved.bitwise_left_shift_(distance))
        elif low < inside:
            mask = _mask(bits, [field for field in range(2**inside) if not field >> low & 1])
            distance = bits * 2**low
            for i, first in enumerate(words):
                if i >> high - inside & 1:
                    continue
                second = words[i | 1 << high - inside]
                torch.bitwise_right_shift(first, distance, out=moved)
                moved.bitwise_xor_(second).bitwise_and_(_signed(mask))
                second.bitwise_xor_(moved)
                first.bitwise_xor_(torch.bitwise_left_shift(moved, distance, out=kept))
        else:
            lower, upper = 1 << low - inside, 1 << high - inside
            for i in range(len(words)):
                if i & lower and not i & upper:
                    j = i ^ lower ^ upper
                    words[i], words[j] = words[j], words[i]
    return words


def _mask(bits: int, fields: Iterable[int]) -> int:
    """The word in which all bits of the given fields are set."""
    return sum((2**bits - 1) << bits * field for field in fields)


def _signed(mask: int) -> int:
    """A word of 32 bits as int32 has it."""
    return mask - 2**32 if mask >= 2**31 else mask


def _field(words: Tensor, low: int, width: int) -> Tensor:
    """Bits ``low .. low+width-1`` of int32 words, as non-negative numbers unless they are all 32."""
    return words if width == 32 else (words >> low) & ((1 << width) - 1)


def _pack_down(values: Tensor, bits: int, container: torch.dtype, per_word: int, words: int) -> Tensor:
    """``pack_bits`` along the first axis, ``per_word`` whole values a word: rows are combined as they lie."""
    padding = words * per_word - values.shape[0]
    rows = torch.cat([values, values.new_zeros(padding, *values.shape[1:])]) if padding else values
    source = rows.unflatten(0, (words, per_word))
    stream = values.new_zeros(words, *values.shape[1:], _CONTAINER_BITS[container] // 8)
    for i in range(per_word):
        byte, shift = divmod(i * bits, 8)
        stream[..., byte] |= source[:, i] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= source[:, i] >> (8 - shift)
    return _view_as(stream, container).squeeze(-1)


def _view_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of the last axis as another integer dtype."""
    # Through one axis: contiguous() keeps odd strides on axes of length 1, which a view of another dtype refuses.
    flat = tensor.contiguous().reshape(-1).view(dtype)
    return flat.view(*tensor.shape[:-1], tensor.shape[-1] * tensor.itemsize // dtype.itemsize)


def _period(bits: int, word_bits: int, per_word: int | None) -> tuple[int, int]:
    """Shortest run of values that fills whole bytes the same way each time: (values, bytes)."""
    if per_word:
        return per_word, word_bits // 8
    stream_bits = math.lcm(bits, 8)
    return stream_bits // bits, stream_bits // 8


def _word_bits(bits: int, container: torch.dtype, per_word: int | None) -> int:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; allowed are 1 to 8")
    if container not in _CONTAINER_BITS:
        raise ValueError(f"container is {container}; allowed are int8, uint8, int16, int32, int64")
    word_bits = _CONTAINER_BITS[container]
    if per_word is not None and not 0 < per_word * bits <= word_bits:
        raise ValueError(f"{per_word} values of {bits} bits do not fit in a word of {word_bits} bits")
    return word_bits
