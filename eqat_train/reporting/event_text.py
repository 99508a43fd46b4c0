"""What a person is told of a training event."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["describe_event"]


def describe_event(kind: str, fields: Mapping[str, Any]) -> str | None:
    """The text of an event, or None for events that only logs and scripts want."""
    if kind in _TEXTS:
        return _TEXTS[kind](fields)
    if kind == "e2e_validation":
        return f"validation loss {fields['when']} E2E-QP: {fields['loss']:.4f}"
    if kind == "evaluation" and fields["perplexity"] is not None:
        return f"{fields['model']}: perplexity {fields['perplexity']:.2f}"
    if kind == "done":
        return (
            f"native checkpoint: {fields['out']} ({fields['seconds']:.0f} s)\n"
            "next: eqat export --to gptq\n"
            "      eqat verify"
        )
    return None


def _memory(fields: Mapping[str, Any]) -> str:
    gib = {name: size / 2**30 for name, size in fields.items()}
    parts = [("packed weights", "packed_weights"), ("scales", "scales"), ("their gradients and AdamW", "training")]
    parts += [("embeddings, head and norms", "dense")]
    rest = gib["peak"] - sum(gib[name] for _, name in parts)
    listed = ", ".join(f"{text} {gib[name]:.2f}" for text, name in parts)
    return f"E2E-QP peak GPU memory {gib['peak']:.2f} GiB: {listed}, activations {rest:.2f}"


def _qat_validation(fields: Mapping[str, Any]) -> str:
    return f"validation loss {fields['when']} E2E-QAT: {fields['loss']:.4f}"


def _qat_codes(fields: Mapping[str, Any]) -> str:
    peak = f"peak memory {fields['peak'] / 2**30:.2f} GiB"
    return f"{fields['changed']:.1%} of {fields['weights']:,} codes are not the start's; {peak}"


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


def _experts(fields: Mapping[str, Any]) -> str:
    tokens, rounded = fields["tokens"], fields["rounded"]
    line = f"block {fields['index'] + 1}: {len(tokens)} experts saw {min(tokens):,} to {max(tokens):,} tokens each"
    if not rounded:
        return line
    named = ", ".join(map(str, rounded[:8])) + (", ..." if len(rounded) > 8 else "")
    return f"{line}; {len(rounded)} below {fields['least']:,} stay rounded to the nearest: {named}"


_TEXTS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "block": _block,
    "data": _data,
    "experts": _experts,
    "e2e_memory": _memory,
    "qat_codes": _qat_codes,
    "qat_validation": _qat_validation,
}
