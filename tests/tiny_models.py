"""Tiny random models of every architecture that training is tested on, saved as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
    SmolLM3Config,
)

__all__ = [
    "ARCHITECTURES",
    "HIDDEN_SIZE",
    "MIXTURES",
    "MULTIMODAL",
    "SEQUENCE",
    "SHAPE",
    "VOCABULARY",
    "save_tiny_model",
    "tiny_config",
    "tiny_tokens",
]

HIDDEN_SIZE = 64
VOCABULARY = 257  # every byte, and <|endoftext|> as id 0
SEQUENCE = 24
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

# Sliding windows are shorter than SEQUENCE, so that masks differ from plain causal ones.
ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=8, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    "phi3": lambda: Phi3Config(**SHAPE, tie_word_embeddings=False),
    "olmo2": lambda: Olmo2Config(**SHAPE, tie_word_embeddings=False),
    "smollm3": lambda: SmolLM3Config(**SHAPE, no_rope_layer_interval=2),
}

# Mixtures of four experts, two a token; Qwen2's first layer is an ordinary one.
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
MIXTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SHAPE, **_EXPERTS, moe_intermediate_size=64, shared_expert_intermediate_size=96, mlp_only_layers=[0]
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, **_EXPERTS, head_dim=16, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "olmoe": lambda: OlmoeConfig(**SHAPE, **_EXPERTS),
}

# Models of images and text: a vision tower of three layers, a projector, and a text decoder.
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
MULTIMODAL: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava": lambda: LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, projection_dim=32).to_dict(),
        text_config=LlamaConfig(**SHAPE).to_dict(),
        image_token_index=256,
        image_seq_length=16,
    ),
    "gemma3": lambda: Gemma3Config(
        vision_config=SiglipVisionConfig(**_VISION).to_dict(),
        text_config=Gemma3TextConfig(
            **SHAPE,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=256,
        boi_token_index=254,
        eoi_token_index=255,
    ),
}


def tiny_config(architecture: str) -> PreTrainedConfig:
    """Configuration of a two-layer model: a key of ``ARCHITECTURES``, ``MIXTURES`` or ``MULTIMODAL``."""
    return (ARCHITECTURES | MIXTURES | MULTIMODAL)[architecture]()


def tiny_tokens(samples: int, sequence: int = SEQUENCE, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 ``[samples, sequence]``."""
    return torch.randint(1, VOCABULARY, (samples, sequence), generator=torch.Generator().manual_seed(seed))


def save_tiny_model(
    folder: Path,
    architecture: str | Callable[[], PreTrainedConfig] = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Saves a random model and a byte-level tokenizer, and returns the folder.

    Norm weights and biases are random too, so that a forgotten one is noticed.
    """
    torch.manual_seed(seed)
    config = tiny_config(architecture) if isinstance(architecture, str) else architecture()
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, 0.08)
    model.to(dtype).save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<|endoftext|>": 0}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
