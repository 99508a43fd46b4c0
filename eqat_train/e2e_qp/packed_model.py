"""A quantized checkpoint as a model in memory whose weights stay packed, and its way back to disk.

Quantized linears become :class:`QuantLinear`; embeddings, norms, the head and linears left in full precision are
cast to the compute dtype (float32 holds every stored value exactly) and are never trained. Writing takes codes,
zero-points, biases and every other tensor from the checkpoint again and only the scales from the model, so that
nothing else can change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from formats import get_format
from formats.checkpoint import CheckpointWriter
from formats.errors import InputError
from formats.model import Checkpoint
from formats.model_writer import write_layer, write_model_config

from ..models.packed import load_packed
from .quant_linear import QuantLinear
from .shared_words import SharedWords

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PackedModel", "load_packed_model", "write_trained"]


@dataclass(frozen=True, eq=False)
class PackedModel:
    """A model with packed linears.

    Attributes:
        model: in evaluation mode; its scales are the only parameters that require gradients.
        linears: module path -> packed linear, in the checkpoint's order.
        layers: the decoder layers.
    """

    model: PreTrainedModel
    linears: dict[str, QuantLinear]
    layers: nn.ModuleList

    @property
    def scales(self) -> list[nn.Parameter]:
        """Every trainable parameter."""
        return [linear.scales for linear in self.linears.values()]

    @property
    def vocabulary(self) -> int:
        """Token ids that the model knows."""
        return self.model.get_input_embeddings().get_parameter("weight").shape[0]


def load_packed_model(
    checkpoint: Checkpoint,
    *,
    scale_dtype: torch.dtype = torch.float16,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    words: SharedWords | None = None,
) -> PackedModel:
    """Loads a quantized checkpoint layer by layer.

    Args:
        checkpoint: an open quantized checkpoint in any readable format.
        scale_dtype: what the scales are rounded to in forward.
        compute_dtype: dtype of everything that is not packed.
        device: where the model goes.
        trust_remote_code: allow Python files of the folder to run.
        words: keeps this rank's share of the packed words only; None keeps all.

    Raises:
        InputError: the checkpoint is not quantized, or has experts and ``words`` is given.
        CheckpointError: a tensor is missing, unexpected or of a wrong shape.
        UnsupportedSchemeError: the native layout cannot hold a layer.
    """
    folder = checkpoint.reader.folder
    if not checkpoint.layer_names:
        raise InputError(f"{folder} is in full precision; E2E-QP trains the scales of a native or GPTQ checkpoint")

    def make(name: str) -> QuantLinear:
        linear = QuantLinear.from_layer(checkpoint.layer(name), scale_dtype=scale_dtype)
        return linear if words is None else words.share_(linear)

    model, layers, linears = load_packed(
        checkpoint,
        make,
        compute_dtype,
        device,
        trust_remote_code=trust_remote_code,
    )
    if words is not None:
        words.begin(model, model.get_input_embeddings(), list(layers))
    return PackedModel(model, linears, layers)


def write_trained(writer: CheckpointWriter, checkpoint: Checkpoint, linears: Mapping[str, QuantLinear]) -> None:
    """Writes the checkpoint in the native format with the linears' scales, layer by layer."""
    if checkpoint.scheme is None:
        raise InputError(f"{checkpoint.reader.folder} is in full precision; it has no scales to replace")
    native = get_format("native")
    for name in checkpoint.passthrough_names:
        writer.add(name, checkpoint.get(name))
    for name in checkpoint.layer_names:
        scales = linears[name].stored_scales().t().contiguous().cpu()  # [out, groups]
        write_layer(writer, native, name, replace(checkpoint.layer(name), scales=scales))
    write_model_config(
        writer,
        checkpoint.reader.config,
        native,
        checkpoint.scheme,
        checkpoint.ignore,
        overrides=checkpoint.overrides,
    )
    writer.copy_companions(checkpoint.reader.folder)
