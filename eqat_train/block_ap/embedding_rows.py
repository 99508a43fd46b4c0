"""Input embeddings that are larger than a block: each batch reads the rows of its own tokens, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from formats.checkpoint import TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.loading import TensorSource

__all__ = ["EmbeddingRows", "embedding_rows"]


@runtime_checkable
class RowSource(Protocol):
    """A checkpoint that reads single rows."""

    tensors: Mapping[str, TensorInfo]

    def get_rows(self, name: str, rows: list[int]) -> Tensor: ...


def embedding_rows(
    model: PreTrainedModel,
    layers: Iterable[nn.Module],
    names: Mapping[nn.Module, str],
    source: TensorSource,
    device: torch.device,
) -> EmbeddingRows | None:
    """The model's input embeddings by rows, or None where loading them whole takes less than training a block does.

    Args:
        model: a skeleton.
        layers: its blocks.
        names: paths of the modules outside of the blocks.
        source: of the model's tensors.
        device: where to compute.
    """
    module = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    if not isinstance(module, nn.Embedding) or not isinstance(source, RowSource) or module not in names:
        return None
    name = f"{names[module]}.weight"
    whole = module.weight.numel() <= largest or module.max_norm is not None
    if whole or name not in source.tensors or source.tensors[name].shape != tuple(module.weight.shape):
        return None
    return EmbeddingRows(module, name, source, device)


class EmbeddingRows:
    """The rows of a batch in place of an embedding's whole matrix.

    Args:
        module: on the meta device.
        name: of its weight in the source.
        source: an open checkpoint.
        device: where to compute, in fp32.
    """

    def __init__(self, module: nn.Embedding, name: str, source: RowSource, device: torch.device) -> None:
        self.module, self._name, self._source, self._device = module, name, source, device
        self._meta, self._padding = module.weight, module.padding_idx

    def load(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Puts the rows of a call's tokens in place and gives the call's arguments with their positions as ids."""
        ids: Tensor = args[0]
        used, places = ids.cpu().unique(return_inverse=True)
        rows = self._source.get_rows(self._name, used.tolist())
        self.module.weight = nn.Parameter(rows.to(self._device, torch.float32), requires_grad=False)
        self.module.padding_idx = None  # matters to gradients only, and must lie within the matrix
        return places.to(ids.device), *args[1:]

    def restore(self) -> None:
        """Leaves the module as it was."""
        self.module.weight, self.module.padding_idx = self._meta, self._padding
