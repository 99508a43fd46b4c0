"""Folds a random rotation of the residual stream, and of each head's values, into the weights of a Llama.

The rotated model predicts what the model does (QuaRot's offline half, arXiv 2404.00456): the gains of the norms go
into the linears after them, what reads the stream is multiplied by an orthogonal matrix and what writes it by its
transpose. Nothing is left to do when it runs, so it quantizes and exports like any other.

    python -m benchmarks.recipes.rotated_model ref-28m --out ref-28m-rotated
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

__all__ = ["hadamard", "rotate_"]


def hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix with random signs of its columns, orthogonal, float64 ``[size, size]``.

    Raises:
        ValueError: ``size`` is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"{size} is no power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return matrix * signs / size**0.5


@torch.no_grad()
def rotate_(model: LlamaForCausalLM, seed: int = 0) -> None:
    """Rotates a model of float64 weights in place.

    Raises:
        ValueError: the embeddings are the head too, which cannot take the last norm's gains.
    """
    config = model.config
    if config.tie_word_embeddings:
        raise ValueError("tied embeddings cannot hold the gains of the last norm")
    generator = torch.Generator().manual_seed(seed)
    stream = hadamard(config.hidden_size, generator)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ stream)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
            _read(reader, layer.input_layernorm.weight, stream)
        for reader in (mlp.gate_proj, mlp.up_proj):
            _read(reader, layer.post_attention_layernorm.weight, stream)
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(stream.T @ writer.weight)
        layer.input_layernorm.weight.fill_(1)
        layer.post_attention_layernorm.weight.fill_(1)
        values = hadamard(config.head_dim, generator)
        heads = attention.v_proj.weight.unflatten(0, (-1, config.head_dim))  # [heads, head_dim, hidden]
        attention.v_proj.weight.copy_((values.T @ heads).flatten(0, 1))
        heads = attention.o_proj.weight.unflatten(1, (-1, config.head_dim))  # [hidden, heads, head_dim]
        attention.o_proj.weight.copy_((heads @ values).flatten(1, 2))
    _read(model.lm_head, model.model.norm.weight, stream)
    model.model.norm.weight.fill_(1)


def _read(linear: nn.Linear, gains: Tensor, stream: Tensor) -> None:
    linear.weight.copy_(linear.weight * gains @ stream)


def main() -> None:
    """Rotates a checkpoint and writes it in bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out} exists")
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float64)
    rotate_(model, given.seed)
    model.to(torch.bfloat16).save_pretrained(given.out)
    for file in given.model.glob("tokenizer*"):
        shutil.copyfile(file, given.out / file.name)


if __name__ == "__main__":
    main()
