"""Zero-points that were packed without clamping and ran over their neighbours.

A packer that shifts and ORs an integer without masking it puts a zero of -1 into its field *and* sets every later field
of the same word, because -1 is a word of ones. EfficientQAT's packer does so, and auto-round's did for a scalar zero of
0 in the ``z - 1`` layout before pull request 2273. What was there is lost; what can be seen is words that end in a run
of ones, far more often than their fields alone would make them and than words begin with one.
"""

from __future__ import annotations

from torch import Tensor

from .packing import unpack_bits

__all__ = ["overrun_words"]

_WORD_BITS = 32
_FACTOR = 20.0  # times as many as chance makes


def overrun_words(qzeros: Tensor, bits: int, out_features: int, per_word: int | None = None) -> int:
    """Words of which only the upper half is all ones, where their fields by themselves would hardly make them so.

    Args:
        qzeros: int32 ``[groups, words]``, packed along out_features.
        bits: bits a field.
        out_features: fields a row; a last, partial word is not looked at.
        per_word: fields a word; None for a dense stream, whose words say nothing where fields straddle them.

    Returns:
        How many words; 0 where there are no more than chance makes.
    """
    if per_word is None and _WORD_BITS % bits:
        return 0
    count = per_word or _WORD_BITS // bits
    half, full = count // 2, out_features // count
    words = qzeros[:, :full]
    if not words.numel() or half < 2:
        return 0
    if _WORD_BITS > count * bits:
        return int((words < 0).sum())  # the highest bit belongs to no field
    highest = unpack_bits(words, bits, full * count, axis=1, per_word=count).unflatten(1, (full, count)) == 2**bits - 1
    lower, upper = highest[..., :half].all(-1), highest[..., -half:].all(-1)
    alone = highest[~(lower | upper)]
    found, mirrored = int((upper & ~lower).sum()), int((lower & ~upper).sum())
    share = float(alone.float().mean()) if alone.numel() else 1.0
    return found if found > _FACTOR * (words.numel() * share**half + mirrored) else 0
