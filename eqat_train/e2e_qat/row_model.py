"""A full-precision model of which each rank reads and holds its rows of every decoder linear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from formats.checkpoint import CheckpointReader
from formats.errors import CheckpointError

from ..models.experts import Experts
from ..models.loading import build_skeleton, fill_model_
from ..models.targets import Targets
from ..ranks.rows import own_rows
from .row_linear import RowLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_row_model", "names_in_rows"]


def names_in_rows(targets: Targets, *, head: bool) -> list[str]:
    """Module paths of the linears that ranks share: those of the decoder blocks, and a quantized head if asked for."""
    return [
        name
        for name, scheme in targets.schemes.items()
        if name.startswith(f"{targets.path}.") or (head and scheme is not None)
    ]


def load_row_model(
    reader: CheckpointReader,
    names: list[str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a model with :class:`RowLinear` in place of some linears; the rest is whole on every rank.

    Args:
        reader: of a full-precision checkpoint.
        names: module paths of the linears.
        dtype: of floating tensors.
        device: where the model goes.
        trust_remote_code: allow Python files of the folder to run.

    Returns:
        The model in evaluation mode. All ranks have to call it in step, whatever its experts see.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape.
    """
    model = build_skeleton(reader.folder, dtype, trust_remote_code=trust_remote_code)
    for name in names:
        linear = cast(nn.Linear, model.get_submodule(name))
        info = reader.tensors.get(f"{name}.weight")
        if info is None or tuple(info.shape) != tuple(linear.weight.shape):
            found = "is missing" if info is None else f"has shape {list(info.shape)}"
            raise CheckpointError(
                f"{reader.folder}: tensor {name}.weight {found}; config.json describes {list(linear.weight.shape)}"
            )
        rows = own_rows(linear.out_features)
        own = reader.get_rows(f"{name}.weight", range(rows.own.start, rows.own.stop))
        model.set_submodule(name, RowLinear(linear, own.to(device, dtype), rows))
    filled = {f"{name}.weight" for name in names}
    fill_model_(model, _others(reader, filled, dtype), device, reader.folder, filled=filled)
    for module in model.modules():
        if isinstance(module, Experts):
            module.in_step = True
    return model


def _others(reader: CheckpointReader, filled: set[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name in reader.tensors:
        if name not in filled:
            tensor = reader.get(name)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
