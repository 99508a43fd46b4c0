"""The canonical layer with its codes still packed.

Most layouts of the field store one and the same dense little-endian bit stream along in_features: GPTQ,
compressed-tensors, MLX, ONNX Runtime, BitBLAS before its interleave, and EfficientQAT wherever a code's bits divide 32.
They differ in which axis comes first and in what stands beside it. A conversion between two of them moves words and
never unpacks a code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import InvalidLayerError
from .packing import pack_bits, packed_length, unpack_bits, widen_fields
from .types import GroupedLayer, QuantizedLinear, QuantScheme

__all__ = ["PackedLinear"]

_WORD_BITS = 32
_CACHED_WORDS = 2**17  # of eight codes


@dataclass(frozen=True, eq=False)
class PackedLinear(GroupedLayer):
    """One quantized linear layer with packed codes, validated when built.

    Attributes:
        words: int32 ``[ceil(in_features * bits / 32), out_features]``: code ``k`` of a row in stream bits
            ``k*bits .. (k+1)*bits - 1``, low bits first; bits after the last code are 0.
        scales, zeros, scheme, bias, g_idx: as in QuantizedLinear.
        in_features: columns of the weight.

    Raises:
        InvalidLayerError: a shape, dtype or value that contradicts the scheme.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: QuantScheme
    in_features: int
    bias: Tensor | None = None
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        if self.words.dim() != 2 or self.words.dtype != torch.int32 or not self.words.numel():
            raise InvalidLayerError(
                f"words are {self.words.dtype} {list(self.words.shape)}; expected non-empty int32 [words, out]"
            )
        expected = packed_length(self.in_features, self.scheme.bits)
        if self.words.shape[0] != expected:
            raise InvalidLayerError(
                f"{self.words.shape[0]} words a row; {self.in_features} codes of {self.scheme.bits} bits take "
                f"{expected}"
            )
        self.check_parameters(self.words.shape[1])

    @classmethod
    def pack(cls, layer: QuantizedLinear) -> PackedLinear:
        """The same layer with its codes packed."""
        words = pack_bits(layer.codes, layer.scheme.bits, axis=1).T.contiguous()
        return cls(words, layer.scales, layer.zeros, layer.scheme, layer.in_features, layer.bias, layer.g_idx)

    def unpack(self) -> QuantizedLinear:
        """The same layer with one byte a code."""
        if self.scheme.bits > 4 or self.in_features % 8:
            codes = unpack_bits(self.words.T, self.scheme.bits, self.in_features, axis=1)
        else:
            codes = torch.empty(self.out_features, self.in_features, dtype=torch.uint8)
            for rows, words in self.row_words():
                bytes_ = widen_fields(words, self.scheme.bits, self.in_features, 8)
                codes[rows].view(torch.int32).copy_(bytes_.T)
        return QuantizedLinear(codes, self.scales, self.zeros, self.scheme, self.bias, self.g_idx)

    def rows(self, rows: slice) -> PackedLinear:
        """The layer of some of the outputs, without its bias."""
        return replace(self, words=self.words[:, rows], scales=self.scales[rows], zeros=self.zeros[rows], bias=None)

    def row_words(self) -> Iterator[tuple[slice, Tensor]]:
        """The words a few rows at a time, what stays in a core's cache through several operations.

        Yields:
            the rows, and a copy of their words ``[words, rows]``.
        """
        step = max(16, _CACHED_WORDS // self.in_features * 8 // 16 * 16)
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            yield rows, self.words[:, rows].clone(memory_format=torch.contiguous_format)

    def complement(self, where: Tensor) -> PackedLinear:
        """The same weights from ``(maxq - q, -s, maxq - z)`` in the chosen groups.

        Args:
            where: bool ``[out_features, groups]``, True where a group is to be complemented.
        """
        return replace(self, words=self._flipped(where), **self.complemented_parameters(where))

    def _flipped(self, where: Tensor) -> Tensor:
        """The words with every bit of a chosen group's codes turned over."""
        bits, width = self.scheme.bits, self.scheme.width(self.in_features)
        if self.g_idx is None and self.in_features % width == 0 and width * bits % _WORD_BITS == 0:
            # whole words belong to one group
            grouped = self.words.unflatten(0, (self.groups, -1))
            return (grouped ^ -where.T.to(torch.int32)[:, None]).flatten(0, 1)
        flips = (where.to(torch.uint8) * self.scheme.maxq)[:, self.group_index()]
        return self.words ^ pack_bits(flips, bits, axis=1).T
