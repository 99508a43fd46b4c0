"""How strong the inputs of each linear layer are, in the full-precision model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data import TokenWindows
from .settings import QatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["input_powers"]

# The mean square of an input is within a few percent after so many tokens.
TOKENS = 2**16
PASS_TOKENS = 2**13


@torch.no_grad()
def input_powers(
    model: PreTrainedModel, names: Sequence[str], data: TokenWindows, settings: QatSettings
) -> dict[str, Tensor]:
    """Mean square of every input of linear layers over the first windows of the data.

    Args:
        model: in full precision.
        names: paths of the layers.
        data: at most 65536 tokens of it are looked at, and one window at the least.
        settings: device and dtype to compute with.

    Returns:
        Path -> fp32 ``[in_features]``; zeros for an expert that no token came to.
    """
    device, dtype = settings.resolved_device(), settings.resolved_compute_dtype()
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in names}  # [rows, in_features]
    sums = {name: weight.new_zeros(weight.shape[1], dtype=torch.float32) for name, weight in weights.items()}
    seen = dict.fromkeys(names, 0)

    def hook(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).float()  # [tokens, in]
            sums[name] += rows.square().sum(dim=0)
            seen[name] += len(rows)

        return add

    head = model.get_output_embeddings()
    # logits of a large vocabulary take gigabytes, and only a quantized head needs its inputs measured
    run = model if any(model.get_submodule(name) is head for name in names) else model.base_model
    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    windows = data.take(torch.arange(min(len(data), max(1, TOKENS // data.seq_len))))
    try:
        for batch in windows.batches(max(1, PASS_TOKENS // data.seq_len)):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                run(input_ids=batch.input_ids.to(device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: sums[name] / max(1, seen[name]) for name in names}
