"""A quantized checkpoint as a transformers model: its packed layers become modules, the rest is loaded as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from formats.model import Checkpoint

from .decoder import find_decoder_layers
from .loading import build_skeleton, fill_model_
from .replacing import replace_linear_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_packed"]


Packed = TypeVar("Packed", bound=nn.Module)


def load_packed(
    checkpoint: Checkpoint,
    make: Callable[[str], Packed],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, nn.ModuleList, dict[str, Packed]]:
    """Loads a checkpoint layer by layer.

    Args:
        checkpoint: open, in any readable format, or in full precision.
        make: the module for a quantized layer, by its module path.
        dtype: of every floating tensor outside of quantized layers.
        device: where the model goes.
        trust_remote_code: allow Python files of the folder to run.

    Returns:
        The model in evaluation mode, its decoder layers, and module path -> module of the quantized layers in the
        checkpoint's order.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape.
    """
    folder = checkpoint.reader.folder
    model = build_skeleton(folder, dtype, trust_remote_code=trust_remote_code)
    _, layers = find_decoder_layers(model)
    modules = {}
    for name in checkpoint.layer_names:
        modules[name] = make(name).to(device)
        replace_linear_(model, name, modules[name])
    filled = {f"{name}.{local}" for name, module in modules.items() for local in module.state_dict()}
    fill_model_(model, _passthrough(checkpoint, dtype), device, folder, filled=filled)
    return model, layers, modules


def _passthrough(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.passthrough_names:
        tensor = checkpoint.get(name)
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
