"""The table of a run's plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_plan"]


def print_plan(console: Console, fields: Mapping[str, Any]) -> None:
    """Prints a ``plan`` event; its longest texts wrap on a narrow terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("estimate", justify="right", no_wrap=True)
    table.add_column("", overflow="fold", ratio=1)
    part = None
    for row in fields["rows"]:
        if row["part"] != part:
            part = row["part"]
            table.add_row(Text(part, style="bold"))
        table.add_row(f" {row['what']}", _amount(row), Text(row["detail"], style="dim"))
    size = f"{fields['blocks']} blocks, {fields['parameters'] / 1e6:,.0f}M parameters, on {fields['device']}"
    console.print(Text(f"plan for {fields['model']}: {size}"), soft_wrap=True)
    console.print(table)
    for problem in fields["problems"]:
        console.print(Text(f"does not fit: {problem}"), soft_wrap=True)
    console.print(
        Text(f"{fields['disk_free'] / 2**30:.1f} GiB free for {fields['work']}; nothing was written"), soft_wrap=True
    )


def _amount(row: Mapping[str, Any]) -> str:
    if row["bytes"] is not None:
        gib = row["bytes"] / 2**30
        return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"
    if row["seconds"] is None:
        return "?"
    seconds = row["seconds"]
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
