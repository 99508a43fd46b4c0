"""Mixtures of experts: experts that transformers fuses into 3-D parameters, taken apart again.

transformers 5 keeps all experts of a layer in ``gate_up_proj`` ``[experts, 2 * intermediate, hidden]`` and in
``down_proj`` ``[experts, hidden, intermediate]``; files hold one matrix an expert, and so do the engines' quantized
layouts. ``unfuse_experts_`` gives every expert its own linears under the names of the file, so that each is loaded,
quantized, packed and written as any other linear. The router is no linear and stays in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from formats.errors import InputError

from .stored_names import rename_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Expert", "Experts", "check_experts", "count_tokens", "features_per_token", "unfuse_experts_"]


@dataclass(frozen=True)
class _Names:
    """What files call an expert's three linears, and the module around the experts where that has another name too."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    around: tuple[str, str] | None = None  # in transformers, in files


# By model_type; every one is tested against transformers' own forward.
_FAMILIES = {
    "mixtral": _Names("w1", "w3", "w2", ("mlp", "block_sparse_moe")),
    "qwen2_moe": _Names(),
    "qwen3_moe": _Names(),
    "olmoe": _Names(),
}


class Expert(nn.Module):
    """``down(act(gate(x)) * up(x))`` with linears named as files name them."""

    def __init__(self, hidden: int, intermediate: int, act: nn.Module, names: _Names, dtype: torch.dtype) -> None:
        super().__init__()
        self._names, self._act = names, (act,)  # in a tuple: it belongs to the module that was taken apart
        for name, rows, columns in (
            (names.gate, intermediate, hidden),
            (names.up, intermediate, hidden),
            (names.down, hidden, intermediate),
        ):
            linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
            self.add_module(name, linear.requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, hidden]`` -> the same."""
        names = self._names
        gated = self._act[0](getattr(self, names.gate)(x)) * getattr(self, names.up)(x)
        output: Tensor = getattr(self, names.down)(gated)
        return output


class Experts(nn.ModuleList):
    """A layer's experts, each with linears of its own; called as transformers calls its fused ones.

    Attributes:
        per_token: experts that one token is sent to.
        seen: tokens sent to each expert since ``count_tokens`` began; None outside of it.
        in_step: every expert is called in every pass, if need be with no tokens: ranks that share weights call alike.
    """

    def __init__(self, experts: list[Expert], per_token: int) -> None:
        super().__init__(experts)
        self.per_token = per_token
        self.seen: list[int] | None = None
        self.in_step = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: experts of each token, int64 ``[tokens, k]``, no expert twice in a row.
            top_k_weights: their weights, ``[tokens, k]``.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``hidden_states``.
        """
        order = top_k_index.flatten().argsort(stable=True)  # by expert, then by token
        everyone = torch.arange(len(self), device=order.device)
        counts = (top_k_index.flatten()[:, None] == everyone).sum(0).tolist()  # the one wait for the device
        if self.seen is not None:
            self.seen = [before + now for before, now in zip(self.seen, counts, strict=True)]
        result = torch.zeros_like(hidden_states)
        for expert, chosen in zip(self, order.split(counts), strict=True):
            if not len(chosen) and not self.in_step:
                continue
            tokens = chosen // top_k_index.shape[1]
            weights = top_k_weights.flatten()[chosen, None]
            # A token comes once at most, so that nothing is added to one place twice at a time.
            result.index_add_(0, tokens, (expert(hidden_states[tokens]) * weights).to(result.dtype))
        return result


def unfuse_experts_(model: PreTrainedModel, *, rename: bool = True) -> None:
    """Replaces fused experts of a known family by ``Experts`` on the meta device, and names all as files do.

    Args:
        model: its parameters on the meta device.
        rename: off where transformers itself reads the file and renames what is around the experts.
    """
    config = model.config.get_text_config()
    names = _FAMILIES.get(config.model_type)
    if names is None:
        return
    for path, module in list(model.named_modules()):
        if _fused(module) is None:
            continue
        around = path.rpartition(".")[0]
        model.set_submodule(path, _taken_apart(module, names, config.num_experts_per_tok))
        if rename and names.around is not None:
            rename_(model.get_submodule(around.rpartition(".")[0]), *names.around)


def check_experts(block: nn.Module, name: str) -> None:
    """Refuses a block with experts that were not taken apart.

    Raises:
        InputError: a module keeps matrices of several experts in one parameter.
    """
    for path, module in block.named_modules():
        fused = _fused(module)
        if fused is not None:
            raise InputError(
                f"{name}.{path} ({type(module).__name__}) keeps its experts in one parameter, {fused}; eqat takes "
                f"experts apart in {', '.join(_FAMILIES)}"
            )


@contextmanager
def count_tokens(block: nn.Module) -> Iterator[dict[str, tuple[int, ...]]]:
    """Inside, a block's mixtures count the tokens that go to each expert.

    Yields:
        filled on leaving: path of a mixture in the block -> tokens of each expert; empty where there are none.
    """
    mixtures = {path: module for path, module in block.named_modules() if isinstance(module, Experts)}
    for experts in mixtures.values():
        experts.seen = [0] * len(experts)
    counts: dict[str, tuple[int, ...]] = {}
    try:
        yield counts
    finally:
        for path, experts in mixtures.items():
            counts[path], experts.seen = tuple(experts.seen or ()), None


def features_per_token(block: nn.Module) -> float:
    """Numbers that enter or leave a block's linears for one token."""
    mixtures = {path: module for path, module in block.named_modules() if isinstance(module, Experts)}
    total = 0.0
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            within = next((experts for outer, experts in mixtures.items() if path.startswith(f"{outer}.")), None)
            share = 1.0 if within is None else within.per_token / len(within)
            total += share * (module.in_features + module.out_features)
    return total


def _fused(module: nn.Module) -> str | None:
    """Name of a module's own parameter that holds several matrices; convolutions are none of these."""
    if isinstance(module, nn.modules.conv._ConvNd) or type(module).__module__.startswith("torch."):
        return None
    own = module.named_parameters(recurse=False)
    return next((name for name, parameter in own if parameter.dim() == 3 and "proj" in name), None)


def _taken_apart(fused: nn.Module, names: _Names, per_token: int) -> Experts:
    gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
    count, hidden, intermediate = down.shape
    if gate_up.shape != (count, 2 * intermediate, hidden):
        raise InputError(
            f"{type(fused).__name__} has gate_up_proj {list(gate_up.shape)} and down_proj {list(down.shape)}; expected "
            "[experts, 2 * intermediate, hidden] and [experts, hidden, intermediate]"
        )
    act = fused.get_submodule("act_fn")
    return Experts([Expert(hidden, intermediate, act, names, down.dtype) for _ in range(count)], per_token)
