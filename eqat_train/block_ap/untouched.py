"""What Block-AP leaves in a block as it was."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import nn

__all__ = ["untouched_parameters"]


def untouched_parameters(block: nn.Module, quantized: Container[str]) -> Iterator[str]:
    """Local names of the parameters that are neither quantized nor trained.

    Norms and the like, modules without a matrix of their own, are trained beside the quantized linears. A module that
    keeps its matrix in full precision (a skipped linear, a router) keeps all it has; so does a block without any
    quantized linear.

    Args:
        block: a decoder block.
        quantized: local paths of the linears that are quantized.
    """
    modules = dict(block.named_modules())
    idle = not any(name in quantized for name in modules)
    for path, module in modules.items():
        own = dict(module.named_parameters(recurse=False))
        matrix = any(parameter.dim() > 1 for parameter in own.values())
        if idle or (matrix and path not in quantized):
            yield from (f"{path}.{name}" if path else name for name in own)
