"""Draws the pictures of docs/results.md from the rows that the benchmarks appended.

    python -m benchmarks.plot [--results benchmarks/results] [--out docs/plots]

Of rows that differ only in when they were made, the last one is drawn. Bars end at the median; whiskers are the 20th
and 80th percentile. The black tick on a bar is what the device itself allows, measured in the same run: the bytes that
must move at the rate of a large copy, or the operations at the rate of a large 16-bit matmul, whichever takes longer.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 9.0  # inches; a README shows it at about 850 pixels
KEY = ("device", "op", "impl", "shape", "bits", "group_size", "dtype")
# Okabe and Ito's colours, which people with any colour vision tell apart. The first word of an implementation decides.
COLOURS = {
    "eqat": "#0072B2",
    "fused": "#0072B2",
    "triton": "#0072B2",
    "fp16": "#E69F00",
    "cublas": "#E69F00",
    "humming": "#009E73",
    "bitblas": "#CC79A7",
    "upstream": "#D55E00",
    "floor": "#56B4E9",
    "reference": "#999999",
    "torch": "#999999",
    "plain": "#999999",
}
SPARE = ("#F0E442", "#D55E00", "#56B4E9", "#CC79A7", "#009E73")
BUDGETED = ("e2e_qp_step",)  # measured with several memory budgets, which the note says
MARKERS = {"dequant_matmul": "o", "scale_grad": "s", "e2e_qp_step": "D", "block_ap_step": "^", "generate": "P"}
Row = dict[str, Any]
NUMBERS = ("bits", "group_size", "bytes", "flops", "peak_mib", "p20_us", "p50_us", "p80_us")


def read(folder: Path) -> list[Row]:
    """The rows of every CSV file of times, the last of each kind, in the files' order; others hold perplexities."""
    rows: dict[tuple[str, ...], Row] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as handle:
            lines = csv.DictReader(handle)
            if "p50_us" not in (lines.fieldnames or ()):
                continue
            for row in lines:
                key = tuple(row[name] for name in KEY) + (row["note"],) * (row["op"] in BUDGETED)
                rows.pop(key, None)
                numbers = {name: float(row[name]) for name in (*NUMBERS, "ceiling_bytes_s", "ceiling_flops_s")}
                rows[key] = {**row, **numbers, "file": path.stem}
    return list(rows.values())


def colour(impl: str, others: Sequence[str]) -> str:
    """The implementation's colour; ``others`` are those without one of their own."""
    return COLOURS.get(_word(impl)) or SPARE[others.index(impl) % len(SPARE)]


def unknown(rows: Iterable[Row]) -> list[str]:
    """Implementations without a colour of their own."""
    names = dict.fromkeys(row["impl"] for row in rows)
    return [name for name in names if _word(name) not in COLOURS]


def _word(impl: str) -> str:
    return re.split(r"[ ,:]", impl)[0].lower()


def label(row: Row) -> str:
    """Implementation and scheme, and what was kept in memory where that was a choice."""
    scheme = f" w{row['bits']:.0f}g{row['group_size']:.0f}" if row["bits"] else ""
    return row["impl"] + scheme + (f", {row['note'].rpartition(': ')[2]}" if row["op"] in BUDGETED else "")


def bound(row: Row) -> float:
    """Microseconds that the device needs at the least; 0 where nothing was counted, or no ceiling was measured."""
    if not (row["ceiling_bytes_s"] and row["ceiling_flops_s"]):
        return 0.0
    return 1e6 * max(row["bytes"] / row["ceiling_bytes_s"], row["flops"] / row["ceiling_flops_s"])


def heading(figure: Figure, title: str, rows: Sequence[Row]) -> None:
    """Title, and below it the device and versions of the rows."""
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    versions = "; ".join(dict.fromkeys(row["versions"] for row in rows))
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    figure.text(
        0.02, 1 - 0.42 / figure.get_figheight(), f"{devices} · {versions}", fontsize=8, color="#444444", va="top"
    )


def bars(rows: Sequence[Row], title: str, *, rate: bool = False) -> Figure:
    """A panel for each shape, with a scale of its own, and a bar for each implementation and scheme.

    Args:
        rows: of one file.
        title: of the picture.
        rate: draw calls a second in place of times.
    """
    grid = _grid(list(dict.fromkeys(_panel(row) for row in rows)))
    ordered = sorted(rows, key=lambda row: (row["bits"], row["impl"]))
    lines = [list(dict.fromkeys(label(row) for row in ordered if _panel(row) in places)) for places in grid]
    deep, wide = len(grid), max(map(len, grid))
    inches = [0.21 * len(names) for names in lines]
    height = sum(inches) + 0.7 * deep + 0.95
    figure, panels = plt.subplots(
        deep, wide, figsize=(WIDTH, height), squeeze=False, gridspec_kw={"height_ratios": inches}
    )
    others = unknown(rows)
    for line, places, names in zip(panels, grid, lines, strict=True):
        for axes, panel in zip(line, [*places, *[""] * (wide - len(places))], strict=True):
            members = [row for row in rows if _panel(row) == panel]
            if members:
                _draw_bars(axes, members, names, others, rate, labelled=axes is line[0], small=wide > 1)
                axes.set_title(panel, fontsize=8.5, loc="left", pad=3)
            else:
                axes.set_visible(False)
    heading(figure, title, rows)
    tick = "" if rate or not any(map(bound, rows)) else "; black tick: the device's measured bandwidth or matmul rate"
    what = (
        "tokens a second; more is better"
        if rate
        else f"median time of a call; whiskers: 20th and 80th percentile{tick}"
    )
    figure.text(0.985, 0.06 / height, what, fontsize=8, ha="right", color="#444444")
    left = 0.025 + 0.0078 * max(len(name) for names in lines for name in names)
    figure.subplots_adjust(
        left=left,
        right=0.985,
        top=1 - 0.85 / height,
        bottom=0.6 / height,
        hspace=0.72 * deep / sum(inches),
        wspace=0.08,
    )
    return figure


def _panel(row: Row) -> str:
    """What a panel shows: op, where a file has several, and shape."""
    own = row["op"] == row["file"]
    return row["shape"] if own else f"{row['op']}, {row['shape']}"


def _grid(panels: Sequence[str]) -> list[list[str]]:
    """Lines of panels: shapes that differ in M alone beside each other, others three in a line."""
    if all(panel.startswith("M=") for panel in panels):
        lines: dict[str, list[str]] = {}
        for panel in panels:
            lines.setdefault(panel.partition(" ")[2], []).append(panel)
        if len(lines) > 1 or len(panels) <= 4:
            return list(lines.values())
    count = 1 if len(panels) <= 2 else 3
    return [list(panels[start : start + count]) for start in range(0, len(panels), count)]


def _draw_bars(
    axes: Axes,
    rows: Sequence[Row],
    names: Sequence[str],
    others: Sequence[str],
    rate: bool,
    *,
    labelled: bool,
    small: bool,
) -> None:
    unit, scale = (
        ("tokens/s", 0.0) if rate else ("ms", 1e-3) if max(row["p50_us"] for row in rows) >= 1000 else ("µs", 1.0)
    )
    longest = max(_value(row["p50_us"], scale) for row in rows)
    for row in rows:
        place, middle = names.index(label(row)), _value(row["p50_us"], scale)
        low, high = sorted((_value(row["p20_us"], scale), _value(row["p80_us"], scale)))
        axes.barh(place, middle, 0.78, color=colour(row["impl"], others))
        axes.plot([low, high], [place] * 2, color="#333333", lw=0.9)
        if not rate and bound(row):
            axes.plot([bound(row) * scale] * 2, [place - 0.39, place + 0.39], color="black", lw=1.6)
        memory = f"   {row['peak_mib'] / 1024:.2f} GiB" if row["peak_mib"] >= 1024 else ""
        axes.text(
            max(middle, high, 0 if rate else bound(row) * scale) + 0.012 * longest,
            place,
            f"{_digits(middle)} {unit}{memory}",
            fontsize=7.5,
            va="center",
        )
    axes.set_yticks(range(len(names)), names if labelled else [""] * len(names), fontsize=8)
    axes.set_xlim(0, longest * (1.42 if small else 1.25))
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlabel(unit, fontsize=8, labelpad=1)
    axes.locator_params(axis="x", nbins=5)
    _tidy(axes)
    axes.tick_params(axis="y", length=0)


def roofline(rows: Sequence[Row], title: str) -> Figure:
    """Operations a second over operations a byte, below the ceilings of the device."""
    counted = [row for row in rows if row["bytes"] and row["flops"]]
    figure, axes = plt.subplots(figsize=(WIDTH, 5.2))
    others = unknown(counted)
    bandwidth, rate = counted[-1]["ceiling_bytes_s"], counted[-1]["ceiling_flops_s"]
    intensities = [row["flops"] / row["bytes"] for row in counted]
    low, high = min(intensities) / 2, max(*intensities, rate / bandwidth) * 3
    ridge = rate / bandwidth
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([low, ridge, high], [low * bandwidth / 1e12, rate / 1e12, rate / 1e12], color="black", lw=1.4)
    axes.text(ridge * 1.15, rate / 1e12 * 1.12, f"16-bit matmul, {rate / 1e12:.0f} TFLOP/s", fontsize=8)
    axes.text(
        low * 1.25,
        low * 1.25 * bandwidth / 1e12 * 1.3,
        f"bandwidth, {bandwidth / 1e12:.2f} TB/s",
        fontsize=8,
        rotation=40,
        rotation_mode="anchor",
    )
    for name in dict.fromkeys(label(row).split(" w")[0] for row in counted):
        members = [row for row in counted if row["impl"] == name]
        for op in dict.fromkeys(row["op"] for row in members):
            points = [row for row in members if row["op"] == op]
            axes.scatter(
                [row["flops"] / row["bytes"] for row in points],
                [row["flops"] / row["p50_us"] / 1e6 for row in points],
                s=34,
                marker=MARKERS.get(op, "o"),
                color=colour(name, others),
                edgecolors="white",
                linewidths=0.6,
                label=f"{name}, {op}" if len({row["op"] for row in counted}) > 1 else name,
                zorder=3,
            )
    axes.set_xlim(low, high)
    axes.set_xlabel("arithmetic intensity, FLOP a byte that must move", fontsize=9)
    axes.set_ylabel("TFLOP/s at the median time", fontsize=9)
    axes.legend(fontsize=8, loc="lower right", frameon=False)
    _tidy(axes, both=True)
    heading(figure, title, counted)
    figure.subplots_adjust(left=0.085, right=0.985, top=0.86, bottom=0.105)
    return figure


def _value(microseconds: float, scale: float) -> float:
    """In the unit of the axis; 0 stands for a rate."""
    return microseconds * scale if scale else 1e6 / microseconds


def _digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if 0 < value < 1000 else f"{value:.0f}"


def _tidy(axes: Axes, *, both: bool = False) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both" if both else "x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=3)


TITLES = {
    "dequant": "Dequantization: packed words to a 16-bit weight",
    "dequant_matmul": "Packed linear layer",
    "fake_quant": "Fake quantization, forward and backward",
    "scale_grad": "Gradient of the scales (E2E-QP)",
    "block_ap_step": "One Block-AP step",
    "e2e_qp_step": "One E2E-QP micro-step",
    "generate": "Greedy decoding at batch 1",
    "inference_ops": "Between the linears of a decoding step",
    "training_ops": "Between the linears of a training step",
}


def save(figure: Figure, path: Path) -> None:
    """The same rows give the same file."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    plt.close(figure)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """Draws everything that there are rows for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plots")
    parser.add_argument("--kind", choices=["svg", "png"], default="svg")
    given = parser.parse_args()
    plt.rcParams |= {"svg.hashsalt": "eqat", "svg.fonttype": "none", "font.family": ["DejaVu Sans", "sans-serif"]}
    rows = read(given.results)
    if not rows:
        parser.error(f"{given.results} has no rows; run a benchmark first")
    given.out.mkdir(parents=True, exist_ok=True)
    # the rows of scaling.csv say something in pairs alone: docs/results.md has tables of them
    for file in dict.fromkeys(row["file"] for row in rows if row["file"] != "scaling"):
        members = [row for row in rows if row["file"] == file]
        figure = bars(members, TITLES.get(file, file), rate=file == "generate")
        save(figure, given.out / f"{file}.{given.kind}")
    if any(row["bytes"] and row["flops"] for row in rows):
        save(roofline(rows, "Roofline"), given.out / f"roofline.{given.kind}")


if __name__ == "__main__":
    main()
