"""From a folder in any known format to a model that is ready to generate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from formats.model import Checkpoint

from ..models.experts import Experts
from ..models.packed import load_packed
from .decoder import Decoder, GraphedDecoder, ModelDecoder
from .llama_decoder import LlamaDecoder, is_like_llama
from .packed_linear import PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_model", "make_decoder"]


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    impl: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model whose quantized layers stay packed, whatever format they come from.

    Args:
        checkpoint: open, in any readable format, or in full precision.
        dtype: of the activations, and of every tensor outside of quantized layers.
        device: where the model goes.
        impl: who computes packed layers, see :mod:`eqat_train.ops.dispatch`.
        trust_remote_code: allow Python files of the folder to run.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape.
    """

    def make(name: str) -> nn.Module:
        return PackedLinear.from_layer(checkpoint.packed_layer(name), bias_dtype=dtype, impl=impl)

    model, _, _ = load_packed(checkpoint, make, dtype, device, trust_remote_code=trust_remote_code)
    return model


def make_decoder(model: PreTrainedModel, max_length: int, *, graph: bool = True) -> Decoder:
    """The fastest decoder for a model.

    Args:
        model: in evaluation mode, on one device.
        max_length: tokens that fit.
        graph: on CUDA, replay steps from a CUDA graph where the model allows it.

    Returns:
        A decoder that owns the model, which may not be run by itself any more.
    """
    decoder: Decoder = LlamaDecoder(model, max_length) if is_like_llama(model) else ModelDecoder(model, max_length)
    # a mixture asks on the host how many tokens go to each expert, for which a graph cannot wait
    waits = any(isinstance(module, Experts) for module in model.modules())
    if graph and decoder.device.type == "cuda" and not waits:
        decoder = GraphedDecoder(decoder)
    return decoder
