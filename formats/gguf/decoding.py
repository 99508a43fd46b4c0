"""Blocks as a canonical layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..types import QuantizedLinear, QuantScheme
from .blocks import BlockType

__all__ = ["decode_blocks", "regroup"]


def decode_blocks(
    kind: BlockType, codes: Tensor, scales: Tensor, minimums: Tensor | None, bias: Tensor | None
) -> QuantizedLinear:
    """A layer with the type's own bits, its blocks as groups.

    Args:
        kind: block type.
        codes: uint8 ``[out, in]``.
        scales: fp16 ``[out, in / kind.block]``.
        minimums: fp16 of the same shape, for types that store them.
        bias: fp32 ``[out]`` or None.

    Raises:
        CheckpointError: a block's minimum is no integer multiple of its scale.
        InvalidLayerError: a scale is not finite.
    """
    zeros = torch.full(scales.shape, kind.offset or 0, dtype=torch.int32)
    if minimums is not None:
        zeros = _integer_zeros(kind, scales, minimums)
    symmetric = bool((zeros == 2 ** (kind.bits - 1)).all())
    return QuantizedLinear(codes, scales, zeros, QuantScheme(kind.bits, kind.block, sym=symmetric), bias=bias)


def regroup(layer: QuantizedLinear, scheme: QuantScheme, kind: BlockType) -> QuantizedLinear:
    """The same weights in the scheme that they had before they became blocks.

    A group's integers and scale are in its blocks; its zero-point is not, unless its codes span all of ``0..maxq``. Any
    that fits gives the same weights: the type's own if it has as many bits, else the middle, or the nearest to it.

    Args:
        layer: as :func:`decode_blocks` returns it.
        scheme: bits and group_size to go back to.
        kind: its block type.

    Raises:
        CheckpointError: the weights do not have such groups.
    """
    width, columns = scheme.width(layer.in_features), layer.in_features
    if scheme.desc_act or columns % width or width % kind.block:
        raise CheckpointError(f"blocks of {kind.block} along {columns} features are no groups of {scheme}")
    shape = (layer.out_features, columns // width)
    scales = layer.scales.view(*shape, -1)  # [out, groups, blocks]
    if not torch.equal(scales, scales[..., :1].expand_as(scales)):
        raise CheckpointError(f"blocks inside a group of {width} have different scales; they do not come from {scheme}")
    codes = layer.codes.view(*shape, width)
    low, high = (end.int() - _offset(kind) for end in codes.aminmax(dim=2))  # [out, groups] of q - z
    least, most = (-low).clamp(min=0), (scheme.maxq - high).clamp(max=scheme.maxq)
    if bool((least > most).any()):
        raise CheckpointError(f"a group's integers span more than {scheme.maxq}; they do not come from {scheme}")
    usual = _offset(kind) if scheme.bits == kind.bits else 2 ** (scheme.bits - 1)
    zeros = torch.full(shape, usual, dtype=torch.int32).maximum(least).minimum(most)
    shifted = codes + (zeros - _offset(kind))[..., None].to(torch.uint8)  # modulo 256, known to be in range
    symmetric = bool((zeros == 2 ** (scheme.bits - 1)).all())
    return QuantizedLinear(
        shifted.view(layer.out_features, columns),
        scales[..., 0].contiguous(),
        zeros,
        replace(scheme, sym=symmetric),
        bias=layer.bias,
    )


def _offset(kind: BlockType) -> int:
    if kind.offset is None:
        raise CheckpointError(f"{kind.name} blocks have zero-points of their own; eqat never writes them")
    return kind.offset


def _integer_zeros(kind: BlockType, scales: Tensor, minimums: Tensor) -> Tensor:
    """``-m / d`` where that is an integer of the codes' range; 0 where the block is 0 altogether."""
    d, m = scales.double(), minimums.double()
    zeros = torch.where(d == 0, 0.0, -m / torch.where(d == 0, 1.0, d)).round()
    held = (m == -zeros * d) & (zeros >= 0) & (zeros < 2**kind.bits)  # exact in float64
    if not bool(held.all()):
        count = int((~held).sum())
        raise CheckpointError(
            f"{kind.name}: {count} of {held.numel()} blocks have a minimum that is no multiple of their scale; "
            "dequantize the file with transformers (from_pretrained with gguf_file=) and quantize that"
        )
    return zeros.int()
