"""Passes of a stream through a block in which nothing is trained, and what a block is measured by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ranks.group import count_of_ranks
from ..ranks.group import total as total_of_ranks
from .activations import ActivationStore
from .capture import BlockCall
from .trainable_block import TrainableBlock

__all__ = ["Streams", "advance_", "autocast", "forward_spans", "reconstruction_loss", "validate"]

FORWARD_TOKENS = 8192  # tokens a batch
FORWARD_VALUES = 2**25  # and on CUDA hidden states of this many values, where a narrow block would wait for launches


@dataclass(frozen=True)
class Streams:
    """Hidden states of one data split: through the full-precision blocks, and through the finished ones."""

    full: ActivationStore
    quantized: ActivationStore


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to the compute dtype; nothing in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def forward_spans(store: ActivationStore) -> Iterator[tuple[int, int]]:
    """Sample ranges to go through a stream with when nothing is trained."""
    tokens = FORWARD_TOKENS
    if store.device.type == "cuda":
        tokens = max(tokens, FORWARD_VALUES // store.shape[2])
    batch = max(1, tokens // store.shape[1])
    for start in range(0, len(store), batch):
        yield start, min(start + batch, len(store))


@torch.no_grad()
def advance_(store: ActivationStore, block: torch.nn.Module, call: BlockCall, compute_dtype: torch.dtype) -> None:
    """Overwrites a stream with the block's output.

    Raises:
        InputError: the stream is kept in a dtype that does not hold it.
    """
    with autocast(store.device, compute_dtype):
        for start, stop in forward_spans(store):
            store.write(start, call.run(block, store.read(start, stop)))
    store.check_range()


@torch.no_grad()
def validate(block: TrainableBlock, call: BlockCall, streams: Streams, dtype: torch.dtype) -> float | None:
    """Mean squared error of the block over a split, a mean over all its elements; None when it is empty."""
    count = count_of_ranks(len(streams.full))
    if not count:
        return None
    total = torch.zeros((), device=streams.full.device)
    for start, stop in forward_spans(streams.full):
        with autocast(streams.full.device, dtype):
            output = block(call, streams.quantized.read(start, stop))
        total += reconstruction_loss(output, streams.full.read(start, stop)) * (stop - start)
    return total_of_ranks(total).item() / count


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in fp32."""
    return F.mse_loss(output.float(), target.float())
