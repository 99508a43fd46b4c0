"""Hyper-parameters: from ``config.json`` to llama.cpp's metadata keys and back.

Only what llama.cpp computes the same way is written; anything else in a configuration is refused, since the engine
would run another model without a word. Source: ``conversion/base.py`` (``TextModel.set_gguf_parameters``) and
``conversion/llama.py`` of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedSchemeError
from .families import Family, family_of_architecture
from .library import gguf_package
from .rope import add_rope, read_rope, rope_parameters, shortest

__all__ = ["add_hyper_parameters", "head_width", "read_config"]

# Settings of transformers' configurations that llama.cpp's graphs do not know, and the values that mean "not used".
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1.0, None),
    "num_local_experts": (0, None),
    "num_experts": (0, None),
}
# Metadata keys of llama.cpp that change what is computed and have no counterpart in these families.
_FOREIGN = (
    "expert_count",
    "attention.sliding_window",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
)


def add_hyper_parameters(writer: Any, config: Mapping[str, Any], family: Family) -> None:
    """Adds everything but the tokenizer to a ``gguf.GGUFWriter``.

    Raises:
        UnsupportedSchemeError: the configuration asks for what llama.cpp's architecture does not compute.
        CheckpointError: a field is missing.
    """
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise UnsupportedSchemeError(
                f"config.json has {key} {config[key]!r}; llama.cpp's {family.architecture} computes {neutral[0]!r} only"
            )
    writer.add_type("model")
    writer.add_block_count(_integer(config, "num_hidden_layers"))
    writer.add_context_length(_context(config))
    writer.add_embedding_length(_integer(config, "hidden_size"))
    writer.add_feed_forward_length(_integer(config, "intermediate_size"))
    heads = _integer(config, "num_attention_heads")
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    width = head_width(config)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(_number(config, "rms_norm_eps"))
    writer.add_vocab_size(_integer(config, "vocab_size"))
    add_rope(writer, rope_parameters(config), family.architecture)
    writer.add_quantization_version(gguf_package().GGML_QUANT_VERSION)


def read_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: Any
) -> dict[str, Any]:
    """What ``config.json`` would say about a file.

    Args:
        metadata: of the file.
        shapes: ggml tensor name -> shape.
        rope_factors: fp32 numbers of ``rope_freqs.weight``, or None.

    Raises:
        CheckpointError: a needed key is missing, or one asks for something else than these families compute.
    """
    family = family_of_architecture(metadata.get("general.architecture"))
    prefix = family.architecture

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{prefix}.{key}", default)
        if found is None:
            raise CheckpointError(f"the metadata has no {prefix}.{key}")
        return found

    for key in _FOREIGN:
        if metadata.get(f"{prefix}.{key}"):
            raise CheckpointError(
                f"the metadata has {prefix}.{key} {metadata[f'{prefix}.{key}']!r}, "
                f"which {family.causal_lm} does not have"
            )
    heads, hidden = value("attention.head_count"), value("embedding_length")
    if isinstance(heads, list):
        raise CheckpointError("the metadata gives every block its own count of heads, which is not read here")
    width = value("attention.key_length", value("rope.dimension_count", hidden // heads))
    config = {
        "architectures": [family.causal_lm],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": width,
        "hidden_act": "silu",
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": shortest(value("attention.layer_norm_rms_epsilon")),
        "rope_parameters": read_rope(metadata, prefix, width, rope_factors),
        "vocab_size": _rows(shapes, "token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if family.model_type == "llama":
        config["attention_bias"] = _biases(shapes, ("attn_q", "attn_k", "attn_v", "attn_output"))
        config["mlp_bias"] = _biases(shapes, ("ffn_gate", "ffn_up", "ffn_down"))
    for name in ("bos", "eos"):
        if f"tokenizer.ggml.{name}_token_id" in metadata:
            config[f"{name}_token_id"] = metadata[f"tokenizer.ggml.{name}_token_id"]
    return config


def head_width(config: Mapping[str, Any]) -> int:
    """Features a head."""
    return config.get("head_dim") or _integer(config, "hidden_size") // _integer(config, "num_attention_heads")


def _context(config: Mapping[str, Any]) -> int:
    """Positions up to which llama.cpp computes the model: it attends to everything, so no farther than a window."""
    limit = _integer(config, "max_position_embeddings")
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    slides = "sliding_attention" in kinds if kinds else config.get("use_sliding_window", True)
    return min(limit, window) if window and slides else limit


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config.json has {key} {value!r}; GGUF needs an integer")
    return value


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json has {key} {value!r}; GGUF needs a number")
    return float(value)


def _rows(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    if name not in shapes:
        raise CheckpointError(f"the file has no {name}")
    return shapes[name][0]


def _biases(shapes: Mapping[str, tuple[int, ...]], modules: tuple[str, ...]) -> bool:
    """Whether the modules of every block have a bias: all of them or none."""
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    found = {f"blk.{block}.{module}.bias" in shapes for block in blocks for module in modules}
    if len(found) > 1:
        raise CheckpointError(
            f"some of {', '.join(modules)} have a bias and some have none; transformers' Llama has all"
        )
    return found == {True}
