"""The formats eqat knows, loaded when asked for.

One literal table, format id -> ``"module:Class"``. Third parties add theirs through the ``eqat.formats`` entry
point group; an id that is already taken is an error, never an override.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from .base import Format
from .errors import UnknownFormatError

__all__ = ["available_formats", "get_format", "get_format_class"]

_BUILTIN = {
    "native": "formats.native:NativeFormat",
    "gptq": "formats.gptq:GptqV1Format",
    "gptq_v2": "formats.gptq:GptqV2Format",
    "bitblas": "formats.bitblas:BitblasFormat",
    "compressed-tensors": "formats.compressed_tensors:CompressedTensorsFormat",
    "onnx": "formats.onnx:OnnxFormat",
    "gguf": "formats.gguf:GgufFormat",
    "mlx": "formats.mlx:MlxFormat",
    "awq": "formats.awq:AwqFormat",
    "auto-round": "formats.auto_round:AutoRoundFormat",
    "dense": "formats.dense:DenseFormat",
}
ENTRY_POINT_GROUP = "eqat.formats"


@cache
def available_formats() -> MappingProxyType[str, str]:
    """Read-only view of format id -> ``"module:Class"``, built in first.

    Raises:
        UnknownFormatError: an entry point claims an id that is already taken.
    """
    table = dict(_BUILTIN)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in table:
            raise UnknownFormatError(
                f"format id {point.name!r} of {point.value!r} is already taken by {table[point.name]!r}; "
                "uninstall one of the two packages"
            )
        table[point.name] = point.value
    return MappingProxyType(table)


def get_format_class(format_id: str) -> type[Format]:
    """The class behind an id, not yet constructed.

    Raises:
        UnknownFormatError: the id is not registered.
    """
    table = available_formats()
    if format_id not in table:
        raise UnknownFormatError(f"unknown format {format_id!r}; known are {', '.join(table)}")
    module, _, attribute = table[format_id].partition(":")
    return getattr(importlib.import_module(module), attribute)


def get_format(format_id: str, **options: Any) -> Format:
    """The format with this id, constructed with its options.

    Raises:
        UnknownFormatError: the id is not registered.
    """
    return get_format_class(format_id)(**options)
