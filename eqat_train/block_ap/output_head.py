"""An output head that is to be quantized: it is rounded to the nearest, since no block follows to train it for.

E2E-QP trains its scales with all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from formats import Format, QuantScheme, round_to_nearest
from formats.checkpoint import CheckpointReader
from formats.model_writer import encode_layer

from ..models.decoder import is_quantizable
from .checks import check_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_head", "encoded_head", "find_own_head", "why_kept"]


def find_own_head(model: PreTrainedModel, reader: CheckpointReader) -> str | None:
    """Module path of a linear output head with a weight of its own in the checkpoint; None where it shares one."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or not is_quantizable(head):
        return None
    path = next(name for name, module in model.named_modules() if module is head)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return None if tied or f"{path}.weight" not in reader.tensors else path


def why_kept(model: PreTrainedModel, name: str) -> str:
    """Why a linear outside of the blocks is never quantized."""
    if model.get_submodule(name) is model.get_output_embeddings():
        return "shares its weight with the embedding"
    return "is outside the decoder blocks"


def check_head(model: PreTrainedModel, head: tuple[str, QuantScheme] | None, fmt: Format) -> None:
    """Refuses a scheme that does not fit the head; the text names what does."""
    if head is not None:
        path, scheme = head
        check_linear(path, cast(nn.Linear, model.get_submodule(path)), scheme, fmt)


def encoded_head(
    reader: CheckpointReader, head: tuple[str, QuantScheme] | None, fmt: Format, scale_dtype: torch.dtype
) -> dict[str, dict[str, Tensor]]:
    """What is written in the place of each of the head's tensors; nothing where no head is quantized."""
    if head is None:
        return {}
    path, scheme = head
    bias = reader.get(f"{path}.bias") if f"{path}.bias" in reader.tensors else None
    layer = round_to_nearest(reader.get(f"{path}.weight").float(), scheme, scale_dtype, bias)
    encoded = {f"{path}.{local}": tensor for local, tensor in encode_layer(fmt, path, layer).items()}
    return {f"{path}.weight": encoded, f"{path}.bias": {}}
