"""Tables of results: the closing one of a training run with its sample texts, and that of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["print_evaluation", "print_summary", "print_tasks"]


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
    """Prints an ``eval`` event: a row if perplexity was measured, and the sample if there is one."""
    if fields["perplexity"] is not None:
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


def print_tasks(console: Console, fields: Mapping[str, Any]) -> None:
    """Prints a ``tasks`` event: a row a metric, and what was run."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for title in ("value", "\N{PLUS-MINUS SIGN}", "docs", "shots"):
        table.add_column(title, justify="right", no_wrap=title == "value")
    for row in fields["results"]:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        table.add_row(
            Text(row["task"]),
            Text(metric),
            f"{row['value']:.4f}",
            "" if row["stderr"] is None else f"{row['stderr']:.4f}",
            "" if row["documents"] is None else str(row["documents"]),
            "" if row["few_shot"] is None else str(row["few_shot"]),
        )
    console.print(table)
    limited = "" if fields["limit"] is None else f", the first {fields['limit']} documents of each task only"
    console.print(Text(f"{fields['harness']} in {fields['seconds']:.1f} s{limited}"), soft_wrap=True)


def _print_sample(console: Console, prompt: str, sample: str) -> None:
    # A broken model may say anything, terminal escapes included.
    shown = "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in sample)
    text = Text().append(prompt, style="dim").append(shown)
    console.print(Padding(text, (0, 0, 1, 2), expand=False))
