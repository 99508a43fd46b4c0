"""Gradient checkpointing that recomputes little.

A recomputed decoder layer keeps its input, the attention's output, and as many of its linears' outputs as memory
allows; only what lies between runs again in backward, and never the layer's last product, whose output backward does
not need (:mod:`eqat_train.ops.dequant_matmul.autograd`). The last layer is never worth recomputing: its activations
are all alive when backward begins anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .quant_linear import QuantLinear

__all__ = ["least_memory", "most_memory", "plan_recomputing", "recomputed_in_backward"]

_ATTENTION = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)
_PRODUCTS = frozenset((torch.ops.aten.mm.default, torch.ops.aten.addmm.default))


@contextmanager
def recomputed_in_backward(layers: Iterable[nn.Module], kept: Sequence[int | None] | None = None) -> Iterator[None]:
    """Inside, each layer keeps little of its forward pass and runs again in backward.

    Args:
        layers: decoder layers.
        kept: how many linears' outputs each layer keeps, in the order of their calls; None for a layer that is not
            recomputed. By default no layer keeps any.
    """
    changed = list(layers)
    kept = [0] * len(changed) if kept is None else kept
    try:
        for layer, products in zip(changed, kept, strict=True):
            if products is not None:
                # Nothing is random in evaluation mode, so the generator's state need not be kept.
                layer.forward = partial(
                    checkpoint,
                    layer.forward,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=partial(_contexts, products),
                )
        yield
    finally:
        for layer in changed:
            layer.__dict__.pop("forward", None)


def plan_recomputing(layers: Sequence[nn.Module], tokens: int, itemsize: int, budget: int) -> list[int | None]:
    """How many linears' outputs each layer keeps so that activations stay within a budget.

    Args:
        layers: decoder layers with packed linears.
        tokens: of a micro-batch.
        itemsize: bytes of an activation.
        budget: bytes for everything that forward keeps for backward.

    Returns:
        For :func:`recomputed_in_backward`. An output kept saves the same work for each of its bytes, whichever linear
        it is of, so layers are filled one after the other, the last first.
    """
    linears, whole, least = _sizes(layers, tokens * itemsize)
    plan: list[int | None] = [0] * len(linears)
    left = budget - sum(least) - max(whole, default=0)
    for index in reversed(range(len(linears))):
        if index == len(linears) - 1:
            left += least[index]
            plan[index] = None
            continue
        if whole[index] - least[index] <= left:
            left -= whole[index] - least[index]
            plan[index] = None
            continue
        products = 0
        for linear in linears[index][:-1]:
            size = tokens * itemsize * linear.out_features
            if size > left:
                break
            left -= size
            products += 1
        plan[index] = products
    return plan


def least_memory(layers: Sequence[nn.Module], tokens: int, itemsize: int) -> int:
    """Bytes that forward keeps for backward when every layer but the last is recomputed whole."""
    _, whole, least = _sizes(layers, tokens * itemsize)
    return sum(least[:-1]) + max(whole, default=0)


def most_memory(layers: Sequence[nn.Module], tokens: int, itemsize: int) -> int:
    """Bytes that forward keeps for backward when nothing is recomputed."""
    return sum(_sizes(layers, tokens * itemsize)[1])


def _sizes(layers: Sequence[nn.Module], width: int) -> tuple[list[list[QuantLinear]], list[int], list[int]]:
    """Each layer's linears, the bytes it keeps when it is not recomputed, and at the least; ``width`` a feature."""
    linears = [[module for module in layer.modules() if isinstance(module, QuantLinear)] for layer in layers]
    whole = [width * sum(linear.in_features + linear.out_features for linear in found) for found in linears]
    # a layer's input and its attention's output
    least = [2 * width * (found[0].in_features if found else 0) for found in linears]
    return linears, whole, least


def _contexts(products: int) -> Any:
    return create_selective_checkpoint_contexts(_policy(products))


def _policy(products: int) -> Callable[..., CheckpointPolicy]:
    """Keeps the attention's output and the first products'; a policy serves one forward and one recomputation."""
    seen = {False: 0, True: 0}

    def decide(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in _ATTENTION
        if op in _PRODUCTS:
            keep = seen[context.is_recompute] < products
            seen[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return decide
