"""Fills the tables of docs/recipes.md from the CSV files of ``ablation`` and ``peers``.

A table stands between ``<!-- table NAME MODEL -->`` and ``<!-- end -->``: the lines of that table and model, a row a
setting, perplexities as mean and standard deviation over the seeds. The gap is the mean held-out loss above full
precision's, in nats.

    python -m benchmarks.recipes.tables          # writes the page
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["COLUMNS", "PAGE", "RESULTS", "fill", "read_lines", "table"]

RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
COLUMNS = (
    "table",
    "model",
    "variant",
    "setting",
    "bits",
    "group_size",
    "seed",
    "wikitext2",
    "heldout",
    "seconds",
    "tokens",
    "device",
    "versions",
)
MARK = re.compile(r"(<!-- table (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADER = ("", "changes", "scheme", "seeds", "WikiText-2", "held-out", "gap", "tokens", "seconds")
FULL = "full"  # the variant that is the model itself

Line = dict[str, str]


def read_lines(files: Iterable[Path]) -> list[Line]:
    """The lines of all files, whose columns are ``COLUMNS``."""
    lines: list[Line] = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as handle:
            lines += csv.DictReader(handle)
    return lines


def table(lines: Sequence[Line], name: str, model: str) -> str:
    """A Markdown table of the lines of one table and model.

    Raises:
        ValueError: there are none.
    """
    own = [line for line in lines if line["table"] == name and line["model"] == model]
    if not own:
        raise ValueError(f"no line is of table {name} and model {model}")
    full = [float(line["heldout"]) for line in lines if line["model"] == model and line["variant"] == FULL]
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in own:
        key = tuple(line[column] for column in ("variant", "setting", "bits", "group_size", "tokens"))
        groups.setdefault(key, []).append(line)
    rows = [HEADER, ("---",) * len(HEADER)]
    for (variant, setting, bits, group, tokens), same in groups.items():
        heldout = [float(line["heldout"]) for line in same]
        times = [float(line["seconds"]) for line in same if line["seconds"]]
        scheme = f"w{bits}g{group}" if variant != FULL else ""
        gap = f"{statistics.fmean(map(math.log, heldout)) - math.log(full[0]):.3f}" if full else ""
        rows.append(
            (
                variant,
                setting,
                scheme,
                str(len(same)),
                _spread([float(line["wikitext2"]) for line in same]),
                _spread(heldout),
                gap,
                f"{int(tokens) / 1e6:.1f}M" if int(tokens) else "",
                f"{statistics.fmean(times):.0f}" if times else "",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def fill(page: str, lines: Sequence[Line]) -> str:
    """The page with every table written anew."""
    return MARK.sub(lambda found: f"{found[1]}{table(lines, found[2], found[3])}\n{found[4]}", page)


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("csv", nargs="*", type=Path, default=[RESULTS / "ablation.csv", RESULTS / "peers.csv"])
    given = parser.parse_args()
    given.page.write_text(fill(given.page.read_text(encoding="utf-8"), read_lines(given.csv)), encoding="utf-8")


if __name__ == "__main__":
    main()
