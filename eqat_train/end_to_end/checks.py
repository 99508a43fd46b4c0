"""What end-to-end training refuses before it begins."""

from __future__ import annotations

from formats.errors import InputError

from ..data import NO_LOSS, TokenWindows

__all__ = ["check_targets", "check_token_ids"]


def check_targets(data: TokenWindows, val: TokenWindows | None) -> None:
    """Refuses windows without any token to learn from, and validation windows without any loss."""
    empty = ~(data.labels[:, 1:] != NO_LOSS).any(dim=1)
    if empty.any():
        raise InputError(
            f"{int(empty.sum())} of {len(data)} training windows have no token to learn from (first: window "
            f"{int(empty.nonzero()[0])}); drop them, or raise the sequence length so that the answers fit"
        )
    if val is not None and not val.loss_tokens:
        raise InputError(f"the {len(val)} validation windows have no token to measure the loss of; use other data")


def check_token_ids(vocabulary: int, *parts: TokenWindows | None) -> None:
    """Refuses token ids that a model of ``vocabulary`` entries does not know."""
    for windows in parts:
        if windows is None:
            continue
        low, high = (int(bound) for bound in windows.input_ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise InputError(
                f"token ids span {low}..{high}; the model knows 0..{vocabulary - 1}: tokenize with its own tokenizer"
            )
