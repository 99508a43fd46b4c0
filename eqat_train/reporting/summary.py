"""Tables of results: the closing one of a training run with its sample texts, and that of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["print_evaluation", "print_summary"]


def print_summary(console: Console, fields: Mapping[str, Any]) -> None:
    """Prints a ``summary`` event: ``rows`` of models, and the ``prompt`` their samples continue."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for title in ("perplexity", "MB", "bits/weight"):
        table.add_column(title, justify="right")
    for row in fields["rows"]:
        table.add_row(
            row["model"],
            "" if row["perplexity"] is None else f"{row['perplexity']:.2f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bits_per_weight']:.2f}",
        )
    console.print(table)
    for row in fields["rows"]:
        if row["sample"] is not None:
            console.print(Text(f"{row['model']}:", style="bold"))
            _print_sample(console, fields["prompt"], row["sample"])


def print_evaluation(console: Console, fields: Mapping[str, Any]) -> None:
    """Prints an ``eval`` event: one row, and the sample if there is one."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("perplexity", "tokens", "windows", "seconds"):
        table.add_column(title, justify="right")
    table.add_row(
        f"{fields['perplexity']:.4f}",
        str(fields["tokens"]),
        f"{fields['windows']} x {fields['seq_len']}",
        f"{fields['seconds']:.1f}",
    )
    console.print(table)
    if fields["sample"] is not None:
        _print_sample(console, fields["prompt"], fields["sample"])


def _print_sample(console: Console, prompt: str, sample: str) -> None:
    # A broken model may say anything, terminal escapes included.
    shown = "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in sample)
    text = Text().append(prompt, style="dim").append(shown)
    console.print(Padding(text, (0, 0, 1, 2), expand=False))
