"""GPTQ: a dense bit stream, fp16 scales; v1 stores ``z - 1``, v2 stores ``z``.

v1 has no room for ``z = 0``: ``z - 1`` wraps, and readers disagree on how. ``(q, s, z) -> (maxq - q, -s, maxq - z)``
leaves the weights as they are, so groups with ``z = 0`` are written with ``z = maxq`` and a negative scale, and no
field ever wraps. Layout, readers and sources: ``gptq.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .base import Exactness
from .errors import UnsupportedSchemeError
from .gptqmodel import GptqmodelFormat, dynamic_rules, producers
from .packed import PackedLinear
from .qweight import QweightFormat
from .types import QuantizedLinear, QuantScheme

__all__ = ["GptqV1Format", "GptqV2Format", "dynamic_rules", "producers"]

_BITS = (2, 3, 4, 8)
_USUAL_GROUPS = (128, 64, 32, 16)
# gptqmodel loads asymmetric v1 only from itself, from the version on that subtracts 1 the way this writer does.
_V1_QUANTIZER = "gptqmodel:0.9.0"


class GptqV2Format(GptqmodelFormat, QweightFormat):
    """GPTQ with raw zeros (``checkpoint_format: gptq_v2``); exact when scales are fp16 numbers."""

    id: ClassVar[str] = "gptq_v2"
    title: ClassVar[str] = "GPTQ with raw zeros, for readers that do not add 1"

    def per_word(self, bits: int) -> None:
        """A dense stream."""

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """2, 3, 4 or 8 bits, a group size that divides in_features, and whole words along both axes."""
        if scheme.bits not in _BITS:
            raise UnsupportedSchemeError(
                f"{self.id} holds 2, 3, 4 and 8 bits, not {scheme.bits}; use one of those or --to native"
            )
        step = 32 if scheme.bits == 3 else 32 // scheme.bits
        for axis, size in (("in_features", in_features), ("out_features", out_features)):
            if size % step:
                raise UnsupportedSchemeError(
                    f"{axis} is {size}; {self.id} at {scheme.bits} bits takes multiples of {step}; "
                    "leave this layer unquantized or use --to native"
                )
        if scheme.group_size != -1 and in_features % scheme.group_size:
            fitting = [str(size) for size in _USUAL_GROUPS if in_features % size == 0]
            raise UnsupportedSchemeError(
                f"group_size {scheme.group_size} does not divide in_features {in_features}; "
                f"these do: {', '.join([*fitting, '-1'])}; or use --to native"
            )


class GptqV1Format(GptqV2Format):
    """GPTQ with ``z - 1`` in qzeros (``checkpoint_format: gptq``); exact weights when scales are fp16 numbers.

    Args:
        wrap: how a producer that met ``z = 0`` wrapped it: within the ``"field"``, or by borrowing from the
            ``"word"`` (gptqmodel at 2, 4 and 8 bits subtracts from whole words).
    """

    id: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ, the layout most tools read (v1 zeros)"

    def __init__(self, wrap: Literal["field", "word"] = "field") -> None:
        self.wrap = wrap

    def configured(self, config: Mapping[str, Any]) -> GptqV1Format:
        """gptqmodel's own files borrow across the word; ours never wrap, other producers' are taken field by field."""
        found = producers(config)
        return GptqV1Format("word" if "gptqmodel" in found and "eqat" not in found else "field")

    def encode_packed(self, layer: PackedLinear) -> dict[str, Tensor]:
        """Groups with ``z = 0`` are complemented first."""
        absent = layer.zeros == 0
        return super().encode_packed(layer.complement(absent) if bool(absent.any()) else layer)

    def stored_zeros(self, zeros: Tensor) -> Tensor:
        """``z - 1``; zeros are 1 or more here."""
        return zeros - 1

    def zeros_from_stored(self, fields: Tensor, bits: int) -> Tensor:
        """``z + 1`` modulo ``2 ** bits``, with a carry into the next field of the word where the producer borrowed."""
        zeros = fields.to(torch.int32) + 1
        if self.wrap == "word" and 32 % bits == 0:
            zeros = _carry(zeros, bits)
        return zeros & (2**bits - 1)

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """EXACT_WEIGHTS instead of EXACT when a group was complemented."""
        plain = super().exactness(layer)
        complemented = plain is Exactness.EXACT and bool((layer.zeros == 0).any())
        return Exactness.EXACT_WEIGHTS if complemented else plain

    def _quantizers(self) -> list[str]:
        return [*super()._quantizers(), _V1_QUANTIZER]


def _carry(zeros: Tensor, bits: int) -> Tensor:
    """Fields after adding 1 to each and carrying overflow upwards inside 32-bit words along the last axis."""
    rows, columns = zeros.shape
    per_word = 32 // bits
    padded = torch.nn.functional.pad(zeros, (0, -columns % per_word)).view(rows, -1, per_word)
    carry = torch.zeros_like(padded[..., 0])
    fields = []
    for i in range(per_word):
        total = padded[..., i] + carry
        carry = total >> bits
        fields.append(total)
    return torch.stack(fields, dim=-1).view(rows, -1)[:, :columns]
