"""What in a model is quantized: the list of decoder blocks, and the linear layers inside, found by type."""

from __future__ import annotations

from torch import nn

from formats.errors import InputError

__all__ = ["find_decoder_layers", "is_quantizable"]


def is_quantizable(module: nn.Module) -> bool:
    """True for ``nn.Linear`` and subclasses that keep its forward, the layers that are quantized.

    A linear with a single output, such as the gate of a shared expert, is none: no layout packs it.
    """
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and module.out_features > 1


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: of the module lists with linears in every item, the one with most parameters.

    Returns:
        Its path, e.g. ``model.layers``, and the list.

    Raises:
        InputError: there is none, or two are equally large.
    """
    found: list[tuple[int, str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for _, outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not nested and all(map(_has_linear, module)):
            found.append((sum(parameter.numel() for parameter in module.parameters()), path, module))
    found.sort(key=lambda item: item[0], reverse=True)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no torch.nn.ModuleList of blocks with linear layers; "
            "eqat trains decoders built as a list of blocks"
        )
    if len(found) > 1 and found[0][0] == found[1][0]:
        names = ", ".join(f"{path} ({len(module)} items)" for _, path, module in found)
        raise InputError(f"{type(model).__name__} has several lists of blocks of one size: {names}; none stands out")
    return found[0][1], found[0][2]


def _has_linear(module: nn.Module) -> bool:
    return any(is_quantizable(child) for child in module.modules())
