"""Rotary embeddings: ``rope_parameters`` of transformers, and llama.cpp's metadata and ``rope_freqs`` tensor.

Llama 3's scaling has no metadata keys in llama.cpp: its factors are a tensor, by which frequencies are divided.
transformers computes them in ``_compute_llama3_parameters`` (``modeling_rope_utils.py``), llama.cpp's converter in
``LlamaModel.generate_extra_tensors``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedSchemeError
from .library import gguf_package

__all__ = ["add_rope", "llama3_factors", "read_rope", "rope_parameters", "shortest"]

_THETA = 10000.0  # llama.cpp's and transformers' default
# metadata key -> field of rope_parameters
_YARN = {
    "rope.scaling.yarn_ext_factor": "extrapolation_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# (factor, low_freq_factor, high_freq_factor, original context) of the models that have such scaling: 3.1 and 3.3, 3.2
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of a configuration, older spellings included; ``rope_type`` and ``rope_theta`` are set."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
    found.setdefault("rope_theta", config.get("rope_theta") or _THETA)
    return found


def add_rope(writer: Any, rope: Mapping[str, Any], architecture: str) -> None:
    """Adds the metadata keys to a ``gguf.GGUFWriter``; Llama 3's factors are :func:`llama3_factors`.

    Raises:
        UnsupportedSchemeError: llama.cpp does not compute this scaling.
    """
    kind, types = rope["rope_type"], gguf_package().RopeScalingType
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind in ("default", "llama3"):
        if kind == "llama3" and architecture != "llama":
            raise UnsupportedSchemeError(
                f"rope_type 'llama3' in {architecture}: llama.cpp reads its factors in llama only"
            )
        return
    if kind not in ("linear", "yarn"):
        raise UnsupportedSchemeError(
            f"rope_type is {kind!r}; written here are default, linear, yarn and llama3; use another format"
        )
    writer.add_rope_scaling_type(types.LINEAR if kind == "linear" else types.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        if "original_max_position_embeddings" not in rope:
            raise CheckpointError("rope_parameters of type yarn have no original_max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, field in _YARN.items():
            if rope.get(field) is not None:
                writer.add_float32(f"{architecture}.{key}", float(rope[field]))


def llama3_factors(rope: Mapping[str, Any], width: int) -> Tensor | None:
    """fp32 ``[width / 2]``: by what llama.cpp divides each frequency; None unless the scaling is Llama 3's."""
    if rope["rope_type"] != "llama3":
        return None
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    lengths = 2 * math.pi / frequencies
    smooth = (original / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(lengths > original / low, torch.full_like(lengths, factor), between)
    return torch.where(lengths < original / high, torch.ones_like(lengths), factors)


def read_rope(metadata: Mapping[str, Any], prefix: str, width: int, factors: Tensor | None) -> dict[str, Any]:
    """``rope_parameters`` of a file.

    Raises:
        CheckpointError: a scaling that cannot be told from what the file holds.
    """
    rope: dict[str, Any] = {
        "rope_theta": shortest(metadata.get(f"{prefix}.rope.freq_base", _THETA)),
        "rope_type": "default",
    }
    if metadata.get(f"{prefix}.rope.dimension_count", width) != width:
        raise CheckpointError("only a part of each head is rotated, which these families do not do")
    kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
    if factors is not None:
        return _known_llama3(rope, width, factors)
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{prefix}.rope.scaling.type is {kind!r}; none, linear and yarn are read")
    rope |= {"rope_type": kind, "factor": metadata[f"{prefix}.rope.scaling.factor"]}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = metadata[f"{prefix}.rope.scaling.original_context_length"]
        rope |= {field: metadata[f"{prefix}.{key}"] for key, field in _YARN.items() if f"{prefix}.{key}" in metadata}
    return rope


def shortest(value: float) -> float:
    """The decimal number that a stored fp32 stands for: 1e-06 rather than 9.99999997e-07."""
    return float(str(np.float32(value)))


def _known_llama3(rope: dict[str, Any], width: int, factors: Tensor) -> dict[str, Any]:
    for factor, low, high, original in _LLAMA3:
        candidate = {
            **rope,
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        expected = llama3_factors(candidate, width)
        # converters round differently in the last digit
        if expected is not None and torch.allclose(expected, factors, rtol=1e-5, atol=0):
            return candidate
    raise CheckpointError(
        "rope_freqs.weight holds factors of no scaling known here (Llama 3.1, 3.2, 3.3); its settings cannot be told"
    )
