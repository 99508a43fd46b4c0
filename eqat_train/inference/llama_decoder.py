"""Decoding for models built like Llama: what stands between the linears of a block is four kernels.

Llama, Mistral, Qwen2 and Qwen3 share one block: RMS norm, attention with rotary embedding, RMS norm, gated feed-forward
layer. transformers runs some thirty small kernels a block between the linears, which at batch 1 take as long as the
linears of a 2-bit model. Here they are: residual addition with RMS norm (twice), attention with everything around it,
and the gated activation; queries, keys and values come from one linear, gates and ups from another. The same code runs
packed and dense linears, so a comparison of the two compares linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.add_rms_norm import add_rms_norm
from ..ops.decode_attention import AttentionCache, HeadNorms, decode_attention_
from ..ops.decode_attention.reference import rotate, split_heads
from ..ops.gated_silu import gated_silu
from .decoder import Decoder
from .fused_linear import fuse_linears

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["LlamaDecoder", "is_like_llama"]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Those whose frequencies do not depend on how long the text has become.
FIXED_ROPES = ("default", "linear", "llama3", "yarn")


def is_like_llama(model: nn.Module) -> bool:
    """Whether LlamaDecoder computes what the model does."""
    if type(model).__name__ not in ARCHITECTURES:
        return False
    config: Any = model.config
    kinds = getattr(config, "layer_types", None)
    whole = getattr(config, "sliding_window", None) is None if kinds is None else set(kinds) <= {"full_attention"}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return whole and config.hidden_act == "silu" and rope in FIXED_ROPES


@dataclass(frozen=True, eq=False)
class Block:
    """What a decoder layer computes with."""

    attention_norm: Tensor
    qkv: nn.Module
    norms: HeadNorms | None
    cache: AttentionCache
    out: nn.Module
    feed_forward_norm: Tensor
    gate_up: nn.Module
    down: nn.Module


class LlamaDecoder(Decoder):
    """See the module.

    Args:
        model: one that :func:`is_like_llama` accepts, in evaluation mode, on one device. Its linears are taken over: it
            cannot be run by itself any more.
        max_length: tokens that fit.
        impl: who computes what is between the linears, see :mod:`eqat_train.ops.dispatch`.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, max_length: int, *, impl: str = "auto") -> None:
        inner, config = model.model, model.config
        self.max_length, self.impl = max_length, impl
        self.embedding, self.head, self.norm = inner.embed_tokens, model.lm_head, inner.norm.weight
        self.device, self.epsilon = self.norm.device, float(config.rms_norm_eps)
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        positions = torch.arange(max_length, device=self.device).unsqueeze(0)
        cos, sin = (table[0].contiguous() for table in inner.rotary_emb(self.norm, positions))  # [length, head_dim]
        self.blocks = [self._take_block(layer, config, cos, sin) for layer in inner.layers]
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)

    def counters(self) -> Sequence[Tensor]:
        """See Decoder."""
        return [self._position]

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """See Decoder."""
        hidden = self._run(ids, self._attend_prompt)
        self._position.fill_(ids.shape[1])
        return self.head(hidden[-1:])[0]

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        """See Decoder."""
        hidden = self._run(token, self._attend_token)
        self._position.add_(1)
        return self.head(hidden)[0]

    def _run(self, ids: Tensor, attend: Any) -> Tensor:
        """Normalized hidden states ``[length, hidden]`` of ids ``[1, length]``."""
        total, delta = self.embedding(ids[0]), None
        for block in self.blocks:
            total, normed = add_rms_norm(total, delta, block.attention_norm, self.epsilon, impl=self.impl)
            delta = block.out(attend(block, block.qkv(normed)))
            total, normed = add_rms_norm(total, delta, block.feed_forward_norm, self.epsilon, impl=self.impl)
            delta = block.down(gated_silu(*block.gate_up(normed).chunk(2, dim=-1), impl=self.impl))
        return add_rms_norm(total, delta, self.norm, self.epsilon, impl=self.impl)[1]

    def _attend_token(self, block: Block, qkv: Tensor) -> Tensor:
        return decode_attention_(qkv, block.cache, self._position, self.scale, block.norms, impl=self.impl)

    def _attend_prompt(self, block: Block, qkv: Tensor) -> Tensor:
        cache, length = block.cache, qkv.shape[0]
        query, key, value = split_heads(qkv, cache.keys.shape[0], self.head_dim, block.norms)
        cos, sin = cache.cos[:length], cache.sin[:length]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        cache.keys[:, :length], cache.values[:, :length] = key, value
        gqa = query.shape[0] != key.shape[0]
        out = F.scaled_dot_product_attention(
            query.unsqueeze(0),
            key.unsqueeze(0),
            value.unsqueeze(0),
            is_causal=length > 1,
            scale=self.scale,
            enable_gqa=gqa,
        )
        return out[0].transpose(0, 1).reshape(length, -1)  # [length, heads * head_dim]

    def _take_block(self, layer: Any, config: PreTrainedConfig, cos: Tensor, sin: Tensor) -> Block:
        attention, mlp = layer.self_attn, layer.mlp
        shape = (config.num_key_value_heads, self.max_length, self.head_dim)
        norms = None
        if hasattr(attention, "q_norm"):
            norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, self.epsilon)
        block = Block(
            layer.input_layernorm.weight,
            fuse_linears([attention.q_proj, attention.k_proj, attention.v_proj]),
            norms,
            AttentionCache(cos.new_zeros(shape), cos.new_zeros(shape), cos, sin),
            attention.o_proj,
            layer.post_attention_layernorm.weight,
            fuse_linears([mlp.gate_proj, mlp.up_proj]),
            mlp.down_proj,
        )
        # frees what was concatenated, block by block
        del attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        return block
