"""ggml's uniform block types: integers and a scale for every 32 or 64 weights of a row.

A row is a sequence of blocks. ``w = (code - offset) * d``, where Q4_1 and Q5_1 store a minimum ``m = -zero * d``
instead of an offset:

| type | id | block | bytes: content                                                   | code - offset |
|------|----|-------|------------------------------------------------------------------|---------------|
| Q2_0 | 42 | 64    | 18: fp16 d, 16 bytes of four codes each, low bits first          | -1..2         |
| Q4_0 | 2  | 32    | 18: fp16 d, 16 bytes: code j low, code j + 16 high               | -8..7         |
| Q4_1 | 3  | 32    | 20: fp16 d, fp16 m, 16 bytes as in Q4_0                          | reading only  |
| Q5_0 | 6  | 32    | 22: fp16 d, 32 high bits, 16 bytes as in Q4_0                    | -16..15       |
| Q5_1 | 7  | 32    | 24: fp16 d, fp16 m, 32 high bits, 16 bytes as in Q4_0            | reading only  |
| Q8_0 | 8  | 32    | 34: fp16 d, 32 int8                                              | -128..127     |

Blocks are held as uint8 ``[out, in / 32, bytes of 32 weights]``: the file's own bytes in a shape whose last axis (9,
18, 20, 22, 24, 34) tells the types apart. Source: ``ggml/src/ggml-common.h`` (block structures) and
``ggml/src/ggml-quants.c`` (``dequantize_row_*``) of llama.cpp as llama-cpp-python 0.3.36 vendors it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..packed import PackedLinear
from ..packing import add_to_fields_, pack_bits, permute_blocks_, unpack_bits, widen_fields

__all__ = [
    "BLOCK_TYPES",
    "UNIT",
    "WRITABLE",
    "BlockType",
    "block_type_of",
    "pack_blocks",
    "stream_blocks",
    "unpack_blocks",
]

UNIT = 32  # weights the last axis of a blocks tensor stands for; every block is a multiple of it


@dataclass(frozen=True)
class BlockType:
    """One ggml type.

    Attributes:
        name: ggml's name.
        id: ggml's number, as in a file's tensor table.
        block: weights a block.
        bits: bits a code.
        offset: integer that code 0 stands below zero; None where the block stores a minimum instead.
        ftype: llama.cpp's file type of a model that is mostly this type (``enum llama_ftype``).
    """

    name: str
    id: int
    block: int
    bits: int
    offset: int | None
    ftype: int

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""
        return (2 if self.offset is not None else 4) + self.block * self.bits // 8

    @property
    def unit_bytes(self) -> int:
        """Bytes that 32 weights take."""
        return self.block_bytes * UNIT // self.block

    @property
    def bits_per_weight(self) -> float:
        """Scale included."""
        return 8 * self.block_bytes / self.block

    @property
    def low(self) -> int:
        """Smallest integer ``code - offset``."""
        return -(self.offset or 0)

    @property
    def high(self) -> int:
        """Largest integer ``code - offset``."""
        return 2**self.bits - 1 + self.low


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q2_0", 42, 64, 2, 1, 41),
        BlockType("Q4_0", 2, 32, 4, 8, 2),
        BlockType("Q4_1", 3, 32, 4, None, 3),
        BlockType("Q5_0", 6, 32, 5, 16, 8),
        BlockType("Q5_1", 7, 32, 5, None, 9),
        BlockType("Q8_0", 8, 32, 8, 128, 7),
    )
}
# Smallest first.
WRITABLE = tuple(kind for kind in BLOCK_TYPES.values() if kind.offset is not None)
_SIXTEEN = np.dtype("V16")
_RECORDS = {  # of blocks that are made from words
    "Q2_0": np.dtype([("d", "<f2"), ("codes", _SIXTEEN)]),
    "Q4_0": np.dtype([("d", "<f2"), ("codes", _SIXTEEN)]),
    "Q5_0": np.dtype([("d", "<f2"), ("high", "<u4"), ("codes", _SIXTEEN)]),
}
_HALVES = (4, 0, 1, 2, 3)  # index bits of a block's 32 nibbles: code j + 16 stands above code j
_BY_UNIT = {kind.unit_bytes: kind for kind in BLOCK_TYPES.values()}


def block_type_of(unit_bytes: int) -> BlockType | None:
    """The type whose 32 weights take so many bytes."""
    return _BY_UNIT.get(unit_bytes)


def pack_blocks(kind: BlockType, codes: Tensor, scales: Tensor) -> Tensor:
    """Blocks of a weight.

    Args:
        kind: a type with an offset.
        codes: uint8 ``[out, in]``, each below ``2 ** kind.bits``; ``in`` is a multiple of ``kind.block``.
        scales: fp16 ``[out, in / kind.block]``.

    Returns:
        uint8 ``[out, in / 32, kind.unit_bytes]``.
    """
    rows, columns = codes.shape
    packed, body = _empty(kind, scales)
    blocks = columns // kind.block
    if kind.bits == 2:
        body[:] = pack_bits(codes.view(rows, blocks, kind.block), 2, container=torch.uint8)
    elif kind.bits == 8:
        # int8 is the code with its highest bit turned over
        torch.bitwise_xor(codes.view(rows, blocks, kind.block), 0x80, out=body)
    else:
        halves = codes.view(rows, blocks, 2, kind.block // 2)
        if kind.bits == 5:
            high = (codes >> 4).view(rows, blocks, kind.block)
            body[..., :4] = pack_bits(high, 1, container=torch.uint8)
            halves = halves & 0xF
        body[..., -kind.block // 2 :] = pack_bits(halves, 4, axis=2, container=torch.uint8).squeeze(2)
    return packed.view(rows, columns // UNIT, kind.unit_bytes)


def stream_blocks(kind: BlockType, layer: PackedLinear, flip: Tensor, scales: Tensor) -> Tensor:
    """Blocks made of packed codes, without unpacking them.

    Args:
        kind: Q2_0, Q4_0 or Q5_0, of at least as many bits as the layer.
        layer: 2, 3 or 4 bits, every ``q - z``, or ``z - q`` where flipped, within the type's range; its groups are
            multiples of the type's block.
        flip: bool ``[out, groups]``, True where a group is stored as its complement.
        scales: fp16 ``[out, in / kind.block]``.

    Returns:
        As :func:`pack_blocks`.
    """
    packed = np.empty((layer.out_features, layer.in_features // kind.block), _RECORDS[kind.name])
    packed["d"] = scales.numpy()
    zeros = layer.complemented_zeros(flip).T  # [groups, out]
    ones = -flip.T.to(torch.int32) if bool(flip.any()) else None
    for rows, words in layer.row_words():
        grouped = words.view(layer.groups, -1, words.shape[1])  # a group takes whole words
        if ones is not None:
            grouped.bitwise_xor_(ones[:, None, rows])
        if kind.bits == 2:
            codes = words
        else:
            codes, high = _nibbles(kind, words, layer, -kind.low - zeros[:, rows])
            if high is not None:
                packed["high"][rows] = high.numpy().view(np.uint32)
        packed["codes"][rows] = codes.T.contiguous().numpy().view(_SIXTEEN)
    return torch.from_numpy(packed.view(np.uint8)).view(layer.out_features, -1, kind.unit_bytes)


def _nibbles(kind: BlockType, words: Tensor, layer: PackedLinear, addends: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes as they lie in blocks of Q4_0 and Q5_0.

    Args:
        kind: either of them.
        words: int32 ``[words, rows]`` of the layer.
        layer: its scheme and width.
        addends: int32 ``[groups, rows]``, the type's code minus the layer's.

    Returns:
        low four bits, int32 ``[in / 8, rows]``, and for Q5_0 the fifth ones, uint8 ``[rows, in / 8]``.
    """
    rows, bits, high = words.shape[1], layer.scheme.bits, None
    if bits < 4:
        words = widen_fields(words, bits, layer.in_features, 4)
    grouped = words.view(layer.groups, -1, rows)
    if kind.bits == 4 and bits < 4:
        grouped.add_(addends[:, None] * 0x11111111)  # no sum leaves its field
    else:
        over = add_to_fields_(grouped, (addends & (2**kind.bits - 1))[:, None])
        high = over.view(-1, rows).to(torch.uint8).T.contiguous() if kind.bits == 5 else None
    blocks = words.view(-1, UNIT // 8, rows)  # four words of eight codes
    return permute_blocks_(blocks, 4, _HALVES, axis=1).view(-1, rows), high


def unpack_blocks(kind: BlockType, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse of :func:`pack_blocks`.

    Args:
        kind: any type of the table.
        blocks: uint8 ``[out, in / 32, kind.unit_bytes]``.

    Returns:
        codes uint8 ``[out, in]``, scales fp16 ``[out, in / kind.block]``, and minimums fp16 of the same shape for
        types that store them.
    """
    rows, units = blocks.shape[:2]
    count = units * UNIT // kind.block
    packed = blocks.contiguous().view(rows, count, kind.block_bytes)
    scales = _halves(packed[..., :2])
    minimums = _halves(packed[..., 2:4]) if kind.offset is None else None
    body = packed[..., 2 if kind.offset is not None else 4 :]
    if kind.bits == 2:
        codes = unpack_bits(body, 2, kind.block)
    elif kind.bits == 8:
        codes = body ^ 0x80
    else:
        nibbles = body[..., -kind.block // 2 :].unsqueeze(2)  # [out, blocks, 1, 16]
        codes = unpack_bits(nibbles, 4, 2, axis=2).view(rows, count, kind.block)
        if kind.bits == 5:
            codes |= unpack_bits(body[..., :4], 1, kind.block) << 4
    return codes.reshape(rows, units * UNIT), scales, minimums


def _empty(kind: BlockType, scales: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 ``[out, blocks, kind.block_bytes]`` with the scales in place, and its view of what is to be filled."""
    rows, blocks = scales.shape
    packed = torch.empty(rows, blocks, kind.block_bytes, dtype=torch.uint8)
    packed[..., :2] = scales.contiguous().view(torch.uint8).view(rows, blocks, 2)
    return packed, packed[..., 2:]


def _halves(pairs: Tensor) -> Tensor:
    return pairs.contiguous().view(torch.float16).squeeze(-1)
