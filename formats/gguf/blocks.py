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

import torch
from torch import Tensor

from ..packing import pack_bits, unpack_bits

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


def stream_blocks(kind: BlockType, words: Tensor, flip: Tensor, scales: Tensor) -> Tensor:
    """Blocks of Q2_0 from packed codes: theirs is the usual little-endian stream, cut into blocks.

    Args:
        kind: Q2_0.
        words: int32 ``[in / 16, out]`` of 2-bit codes, as PackedLinear holds them.
        flip: bool ``[out, in / 64]``, True where the block's codes are complemented.
        scales: fp16 ``[out, in / 64]``.

    Returns:
        As :func:`pack_blocks`.
    """
    packed, body = _empty(kind, scales)
    codes = words.T.contiguous().view(torch.uint8).view(body.shape)
    torch.bitwise_xor(codes, (flip.to(torch.uint8) * 0xFF)[..., None], out=body)
    return packed.view(packed.shape[0], -1, kind.unit_bytes)


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
