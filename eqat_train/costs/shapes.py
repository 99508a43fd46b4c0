"""Sizes of a model that its costs depend on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..models.decoder import is_quantizable
from ..models.experts import Experts, features_per_token

__all__ = ["BlockShape", "ModelShape", "block_shape", "llama_shape", "moe_shape"]


@dataclass(frozen=True)
class BlockShape:
    """One decoder block.

    Attributes:
        parameters: all of them.
        weights: of its linears.
        active: of those, how many a token is multiplied with; fewer than ``weights`` in a mixture of experts.
        largest: weights of its largest linear.
        features: numbers that enter or leave its linears for a token.
    """

    parameters: int
    weights: int
    active: float
    largest: int
    features: float


@dataclass(frozen=True)
class ModelShape:
    """A model.

    Attributes:
        name: for tables.
        blocks: its decoder blocks.
        hidden: numbers a token between blocks.
        vocabulary: rows of the embeddings.
        outside: parameters outside of the blocks.
        head: of those, the output head's; the input embeddings' when they are tied.
    """

    name: str
    blocks: tuple[BlockShape, ...]
    hidden: int
    vocabulary: int
    outside: int
    head: int

    @property
    def weights(self) -> int:
        """Of all linears in blocks."""
        return sum(block.weights for block in self.blocks)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.outside + sum(block.parameters for block in self.blocks)

    @property
    def largest(self) -> BlockShape:
        """The block with most parameters."""
        return max(self.blocks, key=lambda block: block.parameters)


def block_shape(block: nn.Module) -> BlockShape:
    """Of a block of a skeleton."""
    mixtures = {path: module for path, module in block.named_modules() if isinstance(module, Experts)}
    weights, active, largest = 0, 0.0, 0
    for path, module in block.named_modules():
        if not is_quantizable(module):
            continue
        size = module.in_features * module.out_features
        within = next((experts for outer, experts in mixtures.items() if path.startswith(f"{outer}.")), None)
        weights, largest = weights + size, max(largest, size)
        active += size if within is None else size * within.per_token / len(within)
    parameters = sum(parameter.numel() for parameter in block.parameters())
    return BlockShape(parameters, weights, active, largest, features_per_token(block))


def llama_shape(
    name: str, hidden: int, intermediate: int, heads: int, kv_heads: int, layers: int, vocabulary: int
) -> ModelShape:
    """A Llama with an output head of its own."""
    key = hidden // heads * kv_heads
    pairs = [(hidden, hidden)] * 2 + [(hidden, key)] * 2 + [(hidden, intermediate)] * 3
    block = _dense(pairs, norms=2 * hidden)
    return ModelShape(
        name, (block,) * layers, hidden, vocabulary, 2 * vocabulary * hidden + hidden, vocabulary * hidden
    )


def moe_shape(
    name: str,
    hidden: int,
    attention: Iterable[tuple[int, int]],
    intermediate: int,
    experts: int,
    per_token: int,
    shared: int,
    layers: int,
    vocabulary: int,
) -> ModelShape:
    """A mixture in every block: gated experts of one size, ``shared`` of which every token goes through.

    Args:
        name: for tables.
        hidden: numbers a token between blocks.
        attention: in_features and out_features of the attention's linears.
        intermediate: of an expert.
        experts: that are chosen from.
        per_token: of those, for a token.
        shared: further experts, for every token.
        layers: blocks.
        vocabulary: rows of the embeddings.
    """
    around = _dense([*attention, *[(hidden, intermediate)] * (3 * shared)], norms=2 * hidden)
    expert = 3 * hidden * intermediate
    block = BlockShape(
        around.parameters + experts * (expert + hidden),  # and a row of the router
        around.weights + experts * expert,
        around.active + per_token * expert,
        max(around.largest, hidden * intermediate),
        around.features + per_token * 3 * (hidden + intermediate),
    )
    return ModelShape(
        name, (block,) * layers, hidden, vocabulary, 2 * vocabulary * hidden + hidden, vocabulary * hidden
    )


def _dense(pairs: Iterable[tuple[int, int]], norms: int) -> BlockShape:
    sizes = list(pairs)
    weights = sum(one * other for one, other in sizes)
    features = sum(one + other for one, other in sizes)
    return BlockShape(weights + norms, weights, weights, max(one * other for one, other in sizes), features)
