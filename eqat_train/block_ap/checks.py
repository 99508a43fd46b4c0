"""What Block-AP refuses before it begins."""

from __future__ import annotations

import torch
from torch import Tensor

from formats.errors import InputError

__all__ = ["check_tokens"]


def check_tokens(train: Tensor, val: Tensor, vocabulary: int) -> None:
    """Refuses token windows of a wrong dtype, shape or vocabulary, and none at all."""
    for name, tokens in (("train", train), ("val", val)):
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise InputError(f"{name} tokens are {tokens.dtype} {list(tokens.shape)}; expected int64 [samples, seq]")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise InputError(
                f"{name} tokens span {int(tokens.min())}..{int(tokens.max())} but the model's vocabulary is "
                f"0..{vocabulary - 1}; tokenize with the model's own tokenizer"
            )
    if not train.numel():
        raise InputError("there are no training samples; give at least one, or use epochs 0 for round-to-nearest")
    if len(val) and val.shape[1] != train.shape[1]:
        raise InputError(f"val samples have {val.shape[1]} tokens and train samples {train.shape[1]}; use one length")
