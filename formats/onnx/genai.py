"""``genai_config.json``: what onnxruntime-genai 0.18 needs to generate with the graph.

Source: ``make_genai_config`` of its ``models/builders/base.py``, and the values it reads in ``src/config.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .decoder import Decoder

__all__ = ["GENAI_NAME", "genai_config"]

GENAI_NAME = "genai_config.json"


def genai_config(
    decoder: Decoder, graph: str, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, Any]:
    """The object.

    Args:
        decoder: sizes.
        graph: file name of the graph.
        config: ``config.json``.
        generation: ``generation_config.json``, which wins; empty without one.
    """
    tokens = {key: generation.get(key, config.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    end = tokens["eos_token_id"]
    ends = end if isinstance(end, list) else [end]
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = ends[0]
    return {
        "model": {
            **{key: value for key, value in tokens.items() if value is not None},
            "context_length": decoder.positions,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph,
                "head_size": decoder.head_size,
                "hidden_size": decoder.hidden,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": decoder.layers,
                "num_key_value_heads": decoder.kv_heads,
            },
            "type": decoder.family,
            "vocab_size": decoder.vocabulary,
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "max_length": decoder.positions,
            "past_present_share_buffer": True,
            "repetition_penalty": generation.get("repetition_penalty") or 1.0,
            "temperature": generation.get("temperature") or 1.0,
            "top_k": generation.get("top_k") or 50,
            "top_p": generation.get("top_p") or 1.0,
        },
    }
