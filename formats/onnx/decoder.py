"""What the graph of a decoder takes from ``config.json``, as transformers reads it.

Sources: transformers 5.23, ``models/{llama,mistral,phi3,qwen2,qwen3,smollm3}`` and ``modeling_rope_utils.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedSchemeError

__all__ = ["FAMILIES", "Decoder", "read_decoder", "rotary_caches"]

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
_THETAS = {"smollm3": 2000000.0}  # where configurations do not say
_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Decoder:
    """Sizes and switches of a Llama-like decoder.

    Attributes:
        family: model_type.
        layers, hidden, vocabulary, positions: counts; positions is the longest sequence.
        heads, kv_heads, head_size: of the attention.
        epsilon: of every RMS norm.
        windows: for each layer how many positions it sees, its own included; None for all.
        rotated: for each layer whether positions enter it.
        head_norms: queries and keys are normalized per head.
        rope: rope_parameters, rope_theta included.
    """

    family: str
    layers: int
    hidden: int
    vocabulary: int
    positions: int
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    windows: tuple[int | None, ...]
    rotated: tuple[bool, ...]
    head_norms: bool
    rope: Mapping[str, Any]


def read_decoder(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a configuration describes.

    Raises:
        UnsupportedSchemeError: a family, activation or rotary embedding that the graph does not have.
        CheckpointError: a number is missing or is none.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedSchemeError(
            f"onnx has no graph for model_type {family!r}; it has {', '.join(FAMILIES)}; "
            "dense weights and the runtime's own exporter are another way",
            instead=("gptq",),
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedSchemeError(f"onnx has no graph for hidden_act {activation!r}, only silu", instead=("gptq",))
    layers, heads = _count(config, "num_hidden_layers"), _count(config, "num_attention_heads")
    hidden = _count(config, "hidden_size")
    epsilon = config.get("rms_norm_eps")
    if not isinstance(epsilon, float):
        raise CheckpointError(f"config.json has rms_norm_eps {epsilon!r}; expected a number")
    return Decoder(
        family,
        layers,
        hidden,
        _count(config, "vocab_size"),
        _count(config, "max_position_embeddings"),
        heads,
        _count(config, "num_key_value_heads", heads),
        _count(config, "head_dim", 128 if family == "qwen3" else hidden // heads),
        epsilon,
        _windows(config, family, layers),
        _rotated(config, family, layers),
        family == "qwen3",
        _rope(config),
    )


def rotary_caches(decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, each fp32 ``[positions, head_size / 2]``."""
    rope, size = decoder.rope, decoder.head_size
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    frequencies = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "llama3":
        frequencies = _llama3(frequencies, rope)
    angles = torch.outer(torch.arange(decoder.positions).float(), frequencies)
    return angles.cos(), angles.sin()


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Long waves are stretched by ``factor``, short ones kept, and those between interpolated."""
    trained = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    waves = trained * frequencies / (2 * math.pi)  # how often each turns within the trained length
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / rope["factor"] + kept * frequencies


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters; before it were rope_theta and rope_scaling."""
    found = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    found.setdefault("rope_theta", config.get("rope_theta", _THETAS.get(str(config.get("model_type")), 10000.0)))
    found.setdefault("rope_type", found.get("type", "default"))
    found.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    kind = found["rope_type"]
    partial = found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if kind not in _ROPES or partial != 1.0:
        what = f"rope_type {kind!r}" if kind not in _ROPES else f"partial_rotary_factor {partial}"
        raise UnsupportedSchemeError(f"onnx has no graph for {what}; it has {', '.join(_ROPES)}", instead=("gptq",))
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for key in ("rope_theta", *needed[kind]):
        if not isinstance(found.get(key), (int, float)):
            raise CheckpointError(f"config.json has {key} {found.get(key)!r} for rope_type {kind}; expected a number")
    return found


def _windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if family == "llama" or window is None:
        return (None,) * layers
    if family in ("mistral", "phi3"):
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family == "smollm3":  # where positions do not enter
        return tuple(None if rotated else window for rotated in _rotated(config, family, layers))
    first = config.get("max_window_layers", 28)
    return tuple(None if i < first else window for i in range(layers))


def _rotated(config: Mapping[str, Any], family: str, layers: int) -> tuple[bool, ...]:
    if family != "smollm3":
        return (True,) * layers
    interval = config.get("no_rope_layer_interval", 4)
    flags = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]  # 1 where positions enter
    return tuple(map(bool, flags[:layers]))


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json has {key} {value!r}; expected a positive integer")
    return value
