"""A packed linear in the place of a dense one. Imports torch alone: transformers' own import leads here."""

from __future__ import annotations

from torch import nn

from formats.errors import CheckpointError

__all__ = ["replace_linear_"]


def replace_linear_(model: nn.Module, name: str, packed: nn.Module) -> None:
    """Puts a packed linear in the place of a dense one.

    Args:
        model: has the module.
        name: its path.
        packed: has ``in_features``, ``out_features`` and ``bias``.

    Raises:
        CheckpointError: what is there is no linear, or one of another shape or with another bias.
    """
    module = _linear(model, name)
    found, wanted = (packed.out_features, packed.in_features), (module.out_features, module.in_features)
    if found != wanted:
        raise CheckpointError(
            f"quantized layer {name} is {found[0]} x {found[1]}; config.json describes {wanted[0]} x {wanted[1]}"
        )
    if (module.bias is None) != (packed.bias is None):
        has, wants = ("no bias", "one") if packed.bias is None else ("a bias", "none")
        raise CheckpointError(f"quantized layer {name} has {has}; config.json describes {wants}")
    model.set_submodule(name, packed)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as exc:
        raise CheckpointError(f"quantized layer {name} does not exist in a {type(model).__name__}") from exc
    if not isinstance(module, nn.Linear):
        raise CheckpointError(f"quantized layer {name} is a {type(module).__name__} here; expected a torch.nn.Linear")
    return module
