"""What Block-AP leaves in a block as it was."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from torch import nn

from formats.checkpoint import TensorInfo

__all__ = ["has_matrix", "other_matrices", "untouched_parameters"]


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


def has_matrix(module: nn.Module) -> bool:
    """True for a module with a two-dimensional ``weight`` of its own."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def other_matrices(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Module paths of matrices in a file that belong to none of the model's modules, such as a vision tower's."""
    ours = {name for name, _ in model.named_modules()}
    matrices = (name for name, info in tensors.items() if name.endswith(".weight") and len(info.shape) == 2)
    return [path for path in (name.removesuffix(".weight") for name in matrices) if path not in ours]
