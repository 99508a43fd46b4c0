"""An output head that is to be quantized: it is rounded to the nearest, since no block follows to train it for.

E2E-QP trains its scales with all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from formats import Format, QuantScheme, round_to_nearest
from formats.checkpoint import CheckpointReader
from formats.model_writer import encode_layer

from ..models.targets import check_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_head", "encoded_head"]


def check_head(model: PreTrainedModel, head: tuple[str, QuantScheme] | None, fmt: Format) -> None:
    """Refuses a scheme that does not fit the head; the text names what does."""
    if head is not None:
        path, scheme = head
        check_linear(path, model.get_submodule(path), scheme, fmt)


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
