"""Reports for a person: rich tables and plain lines that also read well without colour."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eqat_export.compare import CheckpointComparison
from eqat_export.console import bar, mark, size_text
from eqat_export.convert import Conversion
from eqat_export.findings import Finding
from eqat_export.format_table import FormatRow, ranges
from eqat_export.inspect import Inspection
from eqat_export.runtime_check import RuntimeResult
from formats.base import Exactness
from formats.container import Choice

__all__ = [
    "show_choices",
    "show_comparison",
    "show_conversion",
    "show_findings",
    "show_formats",
    "show_inspection",
    "show_options",
    "show_runtime",
]

MOST_ROWS = 12
WORST_OF_GOOD = 3
MOST_FINDINGS = 20
HISTOGRAM_ROWS = 16
WIDE = 80  # columns from which tables show everything
FORMATS_WIDE = 120  # the same for eqat formats, whose ids are long


def show_conversion(conversion: Conversion, console: Console) -> None:
    """The closing summary of an export."""
    console.print(
        f"{mark(True, console)} {escape(str(conversion.out))}: {conversion.target_format}, "
        f"{conversion.layers} layers {conversion.scheme}, {size_text(conversion.total_bytes)}, "
        f"{conversion.bits_per_weight:.3g} bits per weight in the layers",
        soft_wrap=True,
    )
    for line in exactness_lines(conversion):
        console.print(f"  {escape(line)}", soft_wrap=True)
    if conversion.choices:
        show_choices(conversion.choices, console)


def show_choices(choices: Sequence[Choice], console: Console) -> None:
    """How many tensors got which type, and why; each reason once, with an example."""
    grouped: dict[tuple[str, float, str], list[str]] = {}
    for choice in choices:
        grouped.setdefault((choice.stored_as, choice.bits_per_weight, choice.why), []).append(choice.name)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stored as", no_wrap=True)
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("why")
    if console.width >= WIDE:
        table.add_column("e.g.", no_wrap=True)
    for (stored_as, bits, why), names in sorted(grouped.items(), key=lambda item: (item[0][1], item[0][0])):
        cells = [stored_as, f"{bits:.3g}", str(len(names)), escape(why)]
        table.add_row(*cells, *([escape(names[0])] if console.width >= WIDE else []))
    console.print(table)


def exactness_lines(conversion: Conversion) -> list[str]:
    """What conversion kept, and what it rounded by how much."""
    lines = []
    read, rounded = conversion.read, conversion.rounded
    if read.tensors:
        lines.append(
            f"ROUNDED on reading: {read.tensors} of {conversion.layers} layers, where {conversion.source_format} has "
            f"rounded products for zero-points; largest error {read.error:.3g} in {read.where}"
        )
    as_read = "then written as read: " if read.tensors else ""
    if exact := conversion.exactness[Exactness.EXACT]:
        lines.append(
            f"{as_read or 'exact: '}codes, zeros and scales bit for bit in {exact} of {conversion.layers} layers"
        )
    if weights := conversion.exactness[Exactness.EXACT_WEIGHTS]:
        lines.append(
            f"{as_read or 'exact weights: '}bit for bit the same, stored another way, in {weights} of "
            f"{conversion.layers} layers"
        )
    if rounded.tensors:
        lines.append(
            f"ROUNDED: {rounded.tensors} of {conversion.layers} layers; largest error {rounded.error:.3g} "
            f"(allowed there {rounded.bound:.3g}) in {rounded.where}, largest relative error {rounded.relative:.3g}"
            + (f"; {conversion.exact_option} rounds less" if conversion.exact_option else "")
        )
    casts = conversion.casts
    if casts.tensors:
        lines.append(
            f"ROUNDED: {casts.tensors} other tensors by a cast; largest error {casts.error:.3g} "
            f"(allowed there {casts.bound:.3g}) in {casts.where}"
        )
    return lines


def show_findings(findings: list[Finding], console: Console) -> None:
    """Findings, errors first; no more than a screenful."""
    order = {"error": 0, "warning": 1, "note": 2}
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    alike: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        alike.setdefault((finding.severity, finding.text), []).append(finding)
    ranked = sorted((group[0] for group in alike.values()), key=lambda finding: order[finding.severity])
    for finding in ranked[:MOST_FINDINGS]:
        others = len(alike[finding.severity, finding.text]) - 1
        where = finding.where + (f" and {others} more" if others else "")
        console.print(
            f"  [{colours[finding.severity]}]{finding.severity}[/]: {escape(where)}: {escape(finding.text)}",
            soft_wrap=True,
        )
    if len(ranked) > MOST_FINDINGS:
        hidden = Counter(finding.severity for finding in ranked[MOST_FINDINGS:])
        more = ", ".join(f"{count} {severity}s" for severity, count in hidden.items())
        console.print(f"  and {more} more (all of them with --json)")


def show_comparison(comparison: CheckpointComparison, console: Console) -> None:
    """The layers that differ, worst first; one line when none does."""
    rows = comparison.rows
    if comparison.informational:
        console.print(f"  quantization error against {escape(comparison.against)}", soft_wrap=True)
    differing = [row for row in rows if not row.ok or row.error > 0]
    if rows and not differing:
        console.print(f"  all {len(rows)} layers hold the same weights, bit for bit")
    if not differing:
        return
    counted = any(row.codes or row.zeros or row.scales for row in differing)
    titles = (*(("codes", "zeros", "scales") if counted else ()), "max error", "of bound", "rel. L2")
    shown = MOST_ROWS if comparison.informational or not all(row.ok for row in rows) else WORST_OF_GOOD
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for row in differing[:shown]:
        values = (row.codes, row.zeros, row.scales) if counted else ()
        cells = ["-" if value is None else str(value) for value in values]
        cells += [f"{row.error:.2g}", "-" if row.used is None else _share(row.used), f"{row.relative:.2g}"]
        verdict = "" if comparison.informational else mark(row.ok, console)
        if console.width >= WIDE:
            table.add_row(escape(row.name), *cells, verdict)
            continue
        console.print(f"  {verdict} {escape(row.name)}" if verdict else f"  {escape(row.name)}", soft_wrap=True)
        facts = ", ".join(f"{title} {cell}" for title, cell in zip(titles, cells, strict=True) if cell != "-")
        console.print(f"    {facts}", soft_wrap=True)
    if console.width >= WIDE:
        console.print(table)
    if len(differing) > shown:
        console.print(f"  and {len(differing) - shown} more layers (all of them with --json)")


def show_runtime(result: RuntimeResult, console: Console) -> None:
    """How the runtime's weights and logits compare with ours."""
    for line in result.lines():
        console.print(f"  {escape(line)}", soft_wrap=True)


def show_formats(rows: list[FormatRow], console: Console) -> None:
    """The table of ``eqat formats``; one block a format where the terminal is narrow."""
    titles = ("bits", "groups", "direction", "exactness", "proved with", "extra")
    values = {
        row.id: (
            ranges(row.bits),
            " ".join(map(str, row.groups)),
            row.direction,
            row.exactness,
            " ".join(row.readers),
            row.extra,
        )
        for row in rows
    }
    if console.width < FORMATS_WIDE:
        for row in rows:
            console.print(f"[bold]{row.id}[/]: {escape(row.title)}")
            facts = Table.grid(padding=(0, 2))
            for title, value in zip(titles, values[row.id], strict=True):
                if value:
                    facts.add_row("", title, value)
            console.print(facts)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("id", *titles):
        table.add_column(title, no_wrap=title in ("id", "bits"), overflow="fold")
    for name, cells in values.items():
        table.add_row(f"[bold]{name}[/]", *cells)
    console.print(table)
    console.print()
    for row in rows:
        console.print(f"[bold]{row.id}[/]: {escape(row.title)}")


def show_options(row: FormatRow, console: Console) -> None:
    """What ``eqat export --to`` takes for one format."""
    console.print()
    if not row.options:
        console.print(f"no export options of its own: eqat export CHECKPOINT --to {row.id}")
        return
    console.print(f"options of eqat export CHECKPOINT --to {row.id}:")
    grid = Table.grid(padding=(0, 2))
    for option in row.options:
        values = "|".join(option.choices) or "TEXT"
        default = f" (default {option.default})" if option.default is not None else ""
        grid.add_row("", escape(f"--{option.name} {values}"), escape(f"{option.help}{default}"))
    console.print(grid)


def show_inspection(inspection: Inspection, console: Console) -> None:
    """Scheme, sizes and histograms."""
    facts = {
        "checkpoint": inspection.folder,
        "model": inspection.architecture,
        "format": f"{inspection.format_id}: {inspection.title}" if inspection.format_id else inspection.title,
        "producer": inspection.producer,
    }
    if inspection.schemes:
        facts["layers"] = f"{inspection.layers} quantized, {_tally(inspection.schemes)}"
        facts["scales"] = _tally(inspection.scale_dtypes)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, escape(value))
    console.print(grid)
    console.print()
    _show_sizes(inspection, console)
    if inspection.layer_tensors:
        _show_layer_tensors(inspection, console)
    if inspection.schemes:
        counts = inspection.histograms
        show_histogram("zeros", _merged(counts.zeros), console)
        show_histogram("scales, by power of two", {f"2^{e}": counts.scales[e] for e in sorted(counts.scales)}, console)
        console.print(f"  {counts.negative_scales} negative, {counts.zero_scales} exactly zero")
    if inspection.layer_tensors:
        show_histogram("codes", _merged(inspection.histograms.codes), console)


def show_histogram(title: str, counts: Mapping[str, int], console: Console) -> None:
    """Counts as horizontal bars."""
    total = sum(counts.values())
    highest = max(counts.values(), default=0)
    width = max(min(console.width - 34, 40), 8)
    console.print()
    console.print(f"[bold]{title}[/]")
    for label, count in counts.items():
        share = 100 * count / total if total else 0.0
        console.print(
            f"  {label:>9} {count:>10} {share:>5.1f}% [cyan]{bar(count / highest if highest else 0, width, console)}[/]"
        )


def _show_sizes(inspection: Inspection, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("part", overflow="fold")
    for title in ("tensors", "weights", "size", "bits/weight"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, part in inspection.parts.items():
        table.add_row(
            name,
            str(part.tensors),
            f"{part.parameters:,}",
            size_text(part.nbytes),
            f"{inspection.bits_per_weight(name):.3f}",
        )
    if len(inspection.parts) > 1:
        tensors = sum(part.tensors for part in inspection.parts.values())
        table.add_row(
            "[bold]all[/]",
            str(tensors),
            f"{inspection.parameters:,}",
            size_text(inspection.nbytes),
            f"{inspection.bits_per_weight():.3f}",
        )
    console.print(table)


def _show_layer_tensors(inspection: Inspection, console: Console) -> None:
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("tensor", "dtype", "shape", "size"):
        table.add_column(title, no_wrap=True)
    for name, (dtype, shape, nbytes) in inspection.layer_tensors.items():
        table.add_row(name, dtype, escape(str(list(shape))), size_text(nbytes))
    console.print(table)


def _share(value: float) -> str:
    """A share of what is allowed; anything beyond ten times is just ``over``."""
    return f"{100 * value:.0f}%" if value <= 10 else "over"


def _merged(counts: Mapping[int, int]) -> dict[str, int]:
    """Every value from 0 to the largest power of two needed, merged into at most HISTOGRAM_ROWS equal spans."""
    if not counts:
        return {}
    size = 1 << max(counts).bit_length()
    span = max(size // HISTOGRAM_ROWS, 1)
    merged = {}
    for low in range(0, size, span):
        label = str(low) if span == 1 else f"{low}-{low + span - 1}"
        merged[label] = sum(counts.get(value, 0) for value in range(low, low + span))
    return merged


def _tally(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())


def next_command(conversion: Conversion, found_again: bool) -> str:
    """What to type after an export; nothing needs naming when ``eqat verify`` finds it by itself."""
    if found_again:
        return "eqat verify"
    return f"eqat verify {_quoted(conversion.out)} --against {_quoted(conversion.source)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
