"""Values to words and back.

Values of ``bits`` bits are laid along one axis into a little-endian stream, low bits first. Two layouts exist in
the field, and one parameter tells them apart:

- dense (``per_word=None``): value ``i`` occupies stream bits ``i*bits .. (i+1)*bits - 1`` and may straddle a word
  boundary. GPTQ, compressed-tensors and MLX pack this way.
- a fixed count a word (``per_word=n``): each word holds ``n`` values and its remaining high bits stay zero.
  EfficientQAT packs 3-bit this way, ten values a word.

The stream is built bytewise in uint8 arithmetic and then viewed as the container, so no intermediate is larger than
the values themselves. The last word is padded with zero bits.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

__all__ = ["pack_bits", "packed_length", "unpack_bits"]

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
