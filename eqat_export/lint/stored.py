"""Facts about the tensors of compressed-tensors layers, from their headers.

Decoding is more lenient than engines are: it reads what any version of the library wrote.
"""

from __future__ import annotations

from eqat_export.tensors import dtype_name
from formats.model import Checkpoint
from formats.packing import packed_length
from formats.safetensors_header import TensorInfo
from formats.types import QuantScheme

from .rules import Value

__all__ = ["FITS", "stored_facts"]

FITS = "fits"


def stored_facts(
    checkpoint: Checkpoint, name: str, scheme: QuantScheme, out_features: int, in_features: int
) -> dict[str, Value]:
    """Tensor -> ``fits`` where it is as the library stores it today, or else its dtype and shape."""
    tensors = {local: checkpoint.reader.tensors[f"{name}.{local}"] for local in checkpoint.layer_shapes(name)}
    packed, scale, zeros, shape = (
        tensors.get(f"weight_{local}") for local in ("packed", "scale", "zero_point", "shape")
    )
    groups = scheme.groups(in_features)
    words, zero_words = (packed_length(count, scheme.bits) for count in (in_features, out_features))
    return {
        "weight_packed": _said(packed, fits=_is_words(packed, out_features, words)),
        "weight_scale": _said(
            scale, fits=scale is not None and scale.dtype.is_floating_point and scale.shape == (out_features, groups)
        ),
        "weight_zero_point": _said(zeros, fits=zeros is None if scheme.sym else _is_words(zeros, zero_words, groups)),
        "weight_shape": _said(shape, fits=shape is None or shape.shape == (2,)),
    }


def _is_words(info: TensorInfo | None, *shape: int) -> bool:
    return info is not None and dtype_name(info.dtype) == "int32" and info.shape == shape


def _said(info: TensorInfo | None, *, fits: bool) -> str:
    if fits:
        return FITS
    return f"{dtype_name(info.dtype)} {list(info.shape)}" if info is not None else "missing"
