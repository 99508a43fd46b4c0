"""Experts of a mixture that saw too few training tokens to be trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..models.experts import Experts
from ..reporting.progress import Reporter

__all__ = ["report_experts", "starved_linears"]


def starved_linears(block: nn.Module, seen: Mapping[str, tuple[int, ...]], least: int) -> frozenset[str]:
    """Local paths of the linears of experts that saw fewer than ``least`` tokens.

    Args:
        block: a decoder block.
        seen: path of a mixture in the block -> tokens of each expert.
        least: tokens from which on an expert is trained.
    """
    starved = []
    for path, counts in seen.items():
        mixture = block.get_submodule(path)
        if not isinstance(mixture, Experts):
            raise TypeError(f"{path} is a {type(mixture).__name__}, no mixture of experts")
        for index, (expert, count) in enumerate(zip(mixture, counts, strict=True)):
            if count < least:
                starved += [f"{path}.{index}.{name}" for name, m in expert.named_modules() if isinstance(m, nn.Linear)]
    return frozenset(starved)


def report_experts(reporter: Reporter, index: int, seen: Mapping[str, tuple[int, ...]], least: int) -> None:
    """Tells how many tokens each expert of a block saw, and which ones stay rounded to the nearest."""
    for path, counts in seen.items():
        rounded = [expert for expert, count in enumerate(counts) if count < least]
        reporter.event("experts", index=index, mixture=path, tokens=counts, least=least, rounded=rounded)
