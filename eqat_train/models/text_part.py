"""Models of more than text: their text decoder alone, under the names that it has in their files.

The decoder is built as the causal language model of ``text_config`` and trained on text; what else such a model has
(vision tower, projector) is never built, and its tensors pass through as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from formats.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["own_name", "place_as_stored_", "text_part"]

_OTHER_PARTS = ("vision_config", "audio_config")
_INSIDE = "language_model"


def text_part(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Configuration of the text decoder of a model that has other parts, too; None for a model of text alone."""
    text = config.get_text_config()
    if text is config or not any(hasattr(config, part) for part in _OTHER_PARTS):
        return None
    return text


def place_as_stored_(model: PreTrainedModel, names: Collection[str]) -> None:
    """Gives the modules of a text decoder the paths that they have in the whole model's file.

    The decoder's own forward goes on finding them where they were. Tensors of the other parts are no longer unexpected.

    Args:
        model: the causal language model of the text decoder.
        names: tensors of the file.

    Raises:
        InputError: the file has the decoder under no known name.
    """
    base = model.base_model_prefix
    probe = next(name for name, parameter in model.named_parameters() if parameter.dim() == 1 and ".0." in name)
    inner = f"{base}.{_INSIDE}"
    if f"{_INSIDE}.{probe}" in names:  # all of it inside
        container = nn.Module()
        for name in list(model._modules):
            _move(model, name, container, name)
        model._modules[_INSIDE] = container
        ours = [_INSIDE]
    elif probe.replace(base, inner, 1) in names:  # the head beside it
        container = nn.Module()
        ours = [inner, *(name for name in model._modules if name != base)]
        _move(model, base, container, _INSIDE)
        model._modules[base] = container
    else:
        raise InputError(
            f"the file has no tensor {_INSIDE}.{probe} or {probe.replace(base, inner, 1)}; eqat trains the text "
            "decoder of a model of several parts where it has one of these names"
        )
    known = "|".join(rf"{re.escape(name)}\." for name in ours)
    model._keys_to_ignore_on_load_unexpected = [rf"^(?!{known})"]


def own_name(name: str) -> str:
    """What the decoder, by itself, calls a tensor that a file has inside of a larger model."""
    return name.removeprefix(f"{_INSIDE}.").replace(f".{_INSIDE}.", ".", 1)


def _move(parent: nn.Module, name: str, to: nn.Module, stored: str) -> None:
    child = parent._modules.pop(name)
    to._modules[stored] = child
    object.__setattr__(parent, name, child)  # for the parent's own forward
