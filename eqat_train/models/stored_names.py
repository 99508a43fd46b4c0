"""Modules under the names that files have for them, where transformers has another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["rename_", "rename_as_stored_"]

# model_type -> children of the model itself: the name in transformers, the name in files.
_RENAMED = {"gpt_neox": (("lm_head", "embed_out"),)}


def rename_as_stored_(model: PreTrainedModel) -> None:
    """Gives what a family's files call otherwise the name that it has there; a tied head is in no file."""
    if getattr(model.config, "tie_word_embeddings", False):
        return
    for attribute, stored in _RENAMED.get(model.config.model_type, ()):
        rename_(model, attribute, stored)


def rename_(parent: nn.Module, attribute: str, stored: str) -> None:
    """A child's paths get the file's name, while the forward of its parent goes on finding it under its own."""
    child = parent._modules.pop(attribute)
    parent._modules[stored] = child
    object.__setattr__(parent, attribute, child)
