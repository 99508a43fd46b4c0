"""What a person is told of a training event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["describe_event"]


def describe_event(kind: str, fields: Mapping[str, Any]) -> str | None:
    """The text of an event, or None for events that only logs and scripts want."""
    if kind == "block":
        return _block(fields)
    if kind == "e2e_validation":
        return f"validation loss {fields['when']} E2E-QP: {fields['loss']:.4f}"
    if kind == "evaluation" and fields["perplexity"] is not None:
        return f"{fields['model']}: perplexity {fields['perplexity']:.2f}"
    if kind == "data":
        return _data(fields)
    if kind == "done":
        return (
            f"native checkpoint: {fields['out']} ({fields['seconds']:.0f} s)\n"
            "next: eqat export --to gptq\n"
            "      eqat verify"
        )
    return None


def _data(fields: Mapping[str, Any]) -> str:
    windows, seq_len, text = fields["windows"], fields["seq_len"], fields["text_tokens"]
    line = f"{fields['stage']} data: {windows} windows of {seq_len} tokens from {fields['data']}"
    if text is not None and windows * seq_len > text:
        line += (
            f", overlapping: the text has {text:,} tokens, so each is read about {windows * seq_len / text:.1f} times"
        )
    return line


def _block(fields: Mapping[str, Any]) -> str | None:
    if fields["train_loss"] is None:  # rounded, not trained
        return None
    line = f"block {fields['index'] + 1}: loss {fields['train_loss']:.3g}"
    if fields["val_loss"] is not None:
        line += f", validation {fields['start_val_loss']:.3g} -> {fields['val_loss']:.3g}"
    return f"{line}, {fields['seconds']:.0f} s"
