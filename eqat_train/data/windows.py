"""Windows of token ids: what every training stage and every evaluation reads.

Labels follow the causal-LM convention of Transformers: they are not shifted. ``labels[i, t]`` is the token at position
``t`` (or -100, no loss), predicted from the tokens before ``t``; ``labels[:, 0]`` therefore never counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import InputError

__all__ = ["NO_LOSS", "TokenWindows"]

NO_LOSS = -100


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Token windows of one length and the labels that take part in the loss.

    Attributes:
        input_ids: int64 ``[windows, seq_len]``.
        labels: int64 ``[windows, seq_len]``, the token ids themselves, -100 where there is no loss; not shifted.

    Raises:
        InputError: shapes or dtypes that do not agree, no window at all, or windows shorter than two tokens.
    """

    input_ids: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("input_ids", self.input_ids), ("labels", self.labels)):
            if tensor.dtype != torch.int64 or tensor.dim() != 2:
                raise InputError(f"{name} are {tensor.dtype} {list(tensor.shape)}; expected int64 [windows, seq_len]")
        if self.input_ids.shape != self.labels.shape:
            raise InputError(
                f"input_ids have shape {list(self.input_ids.shape)} and labels {list(self.labels.shape)}; "
                "they must be equal"
            )
        if not len(self) or self.seq_len < 2:
            raise InputError(f"token windows are {list(self.input_ids.shape)}; at least one of two tokens is needed")

    @classmethod
    def from_ids(cls, input_ids: Tensor) -> TokenWindows:
        """Plain text: every token is a label. ``input_ids`` is integer ``[windows, seq_len]``."""
        ids = input_ids.to(torch.int64)
        return cls(ids, ids)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens in a window, padding included."""
        return self.input_ids.shape[1]

    @property
    def loss_tokens(self) -> int:
        """Tokens that take part in the loss: labels other than -100 after the first position."""
        return int((self.labels[:, 1:] != NO_LOSS).sum())

    def take(self, rows: slice | Tensor) -> TokenWindows:
        """The windows of a slice or of an index tensor."""
        return TokenWindows(self.input_ids[rows], self.labels[rows])

    def batches(self, batch_size: int) -> Iterator[TokenWindows]:
        """Consecutive batches of at most ``batch_size`` windows."""
        for start in range(0, len(self), batch_size):
            yield self.take(slice(start, start + batch_size))
