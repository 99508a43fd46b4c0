"""Norms, gated activations and rotary embeddings of a transformers model, each as one kernel.

A module is taken over only where plain torch in our words gives the very bits of the module's own forward on a probe,
so architectures that compute something else, now or in a later release, keep their own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops.add_rms_norm import add_rms_norm
from ..ops.gated_silu import gated_silu
from ..ops.rotary import rotary
from .quant_linear import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["fused_modules"]

PROBE_TOKENS = 3
# The first that takes the arguments is used; cuDNN's is the fastest on Hopper (benchmarks/loops/e2e_qp_step.py).
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
Forward = Callable[..., Any]


@contextmanager
def fused_modules(model: PreTrainedModel, *, impl: str = "auto") -> Iterator[int]:
    """Inside, the model's modules run fused kernels where they are the same function; yields how many do.

    Args:
        model: on the device where it will run, in evaluation mode, with frozen norms.
        impl: of the operations, see :mod:`eqat_train.ops.dispatch`.
    """
    embedding = model.get_input_embeddings().get_parameter("weight")
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            found = _candidate(module)
            if found is not None and _same_bits(module, *found, embedding):
                module.forward = partial(found[0], module, impl=impl)
                changed.append(module)
        with sdpa_kernel(ATTENTION, set_priority=True), _no_packed_sequences():
            yield len(changed)
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


@contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """Windows hold one sequence each; to make sure, transformers would wait for the device in every forward pass."""
    ask = getattr(masking_utils, "find_packed_sequence_indices", None)
    if ask is None:  # a release that does not
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = ask


def _candidate(module: nn.Module) -> tuple[Forward, int] | None:
    """A forward that may be the module's, and its input features."""
    children = dict(module.named_children())
    if type(module).__name__.endswith("RMSNorm") and not children:
        weight = getattr(module, "weight", None)
        return None if weight is None or weight.requires_grad else (_norm, weight.numel())
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} == children.keys():
        return _gated_mlp, getattr(children["gate_proj"], "in_features", 0)
    if {"q_proj", "k_proj", "v_proj", "o_proj"} == children.keys():
        return _attention, getattr(children["q_proj"], "in_features", 0)
    return None


def _same_bits(module: nn.Module, forward: Forward, features: int, like: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBE_TOKENS, features, generator=generator).to(like)
    arguments: dict[str, Any] = {}
    if forward is _attention:
        angles = torch.rand(1, PROBE_TOKENS, getattr(module, "head_dim", 0) // 2, generator=generator).repeat(1, 1, 2)
        arguments = {"position_embeddings": (angles.cos().to(like), angles.sin().to(like)), "attention_mask": None}
    try:
        # with gradients, so that the linears take training's path
        ours, theirs = forward(module, x, impl="reference", **arguments), module(x, **arguments)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):  # not the module that its children promised
        return False
    return torch.equal(ours[0], theirs[0])  # attention returns its weights too


def _norm(norm: Any, x: Tensor, *, impl: str) -> Tensor:
    return add_rms_norm(x, None, norm.weight, norm.variance_epsilon, impl=impl)[1]


def _gated_mlp(mlp: Any, x: Tensor, *, impl: str) -> Tensor:
    gate, up = _outputs(x, mlp.gate_proj, mlp.up_proj)
    if _trained(mlp.down_proj):
        return mlp.down_proj.gated(gate, up)
    y: Tensor = mlp.down_proj(gated_silu(gate, up, impl=impl))
    return y


def _outputs(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    if _trained(*linears):
        return QuantLinear.together([linear for linear in linears if isinstance(linear, QuantLinear)], x)
    return [linear(x) for linear in linears]


def _trained(*modules: nn.Module) -> bool:
    """Whether all are packed linears on training's path."""
    return torch.is_grad_enabled() and all(isinstance(module, QuantLinear) for module in modules)


def _attention(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    *,
    impl: str,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    x = hidden_states  # [batch, tokens, hidden]
    heads = (*x.shape[:-1], -1, attention.head_dim)
    query, key, value = _outputs(x, attention.q_proj, attention.k_proj, attention.v_proj)
    query, key = (rotary(part.view(heads), *position_embeddings, impl=impl).transpose(1, 2) for part in (query, key))
    value = value.view(heads).transpose(1, 2)  # [batch, heads, tokens, head_dim]
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    # past_key_values is None here: nothing is generated in training
    y, weights = attend(
        attention, query, key, value, attention_mask, dropout=0.0, scaling=attention.scaling,
        sliding_window=getattr(attention, "sliding_window", None), **options,
    )  # fmt: skip
    return attention.o_proj(y.reshape(*x.shape[:-1], -1).contiguous()), weights
