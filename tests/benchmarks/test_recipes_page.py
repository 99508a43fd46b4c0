"""docs/recipes.md says what was measured, and the tables are counted right."""

import math
from pathlib import Path

import pytest

from benchmarks.recipes.tables import COLUMNS, MARK, PAGE, RESULTS, fill, read_lines, table

FILES = [RESULTS / "ablation.csv", RESULTS / "peers.csv"]


def line(**changed: object) -> dict[str, str]:
    values: dict[str, object] = dict.fromkeys(COLUMNS, "")
    values |= {"table": "leads", "model": "m", "variant": "best", "bits": 2, "group_size": 64, "tokens": 2_000_000}
    return {name: str(value) for name, value in (values | changed).items()}


def test_the_page_shows_the_measured_lines() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert MARK.search(page)
    assert fill(page, read_lines(FILES)) == page, "write it anew: python -m benchmarks.recipes.tables"


def test_every_measured_line_is_on_the_page() -> None:
    shown = {(found[2], found[3]) for found in MARK.finditer(PAGE.read_text(encoding="utf-8"))}
    assert {(each["table"], each["model"]) for each in read_lines(FILES)} <= shown


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_line_is_there_twice_and_each_says_where_it_comes_from(file: Path) -> None:
    lines = read_lines([file])
    keys = [
        tuple(each[name] for name in ("table", "model", "variant", "setting", "bits", "group_size", "seed"))
        for each in lines
    ]
    assert len(set(keys)) == len(keys)
    for each in lines:
        assert set(each) == set(COLUMNS)
        assert each["device"] and "torch " in each["versions"]
        assert math.isfinite(float(each["wikitext2"])) and math.isfinite(float(each["heldout"]))


def test_seeds_are_averaged_and_the_gap_is_the_mean_loss_above_full_precisions() -> None:
    lines = [
        line(seed=0, wikitext2=60, heldout=20, seconds=10),
        line(seed=1, wikitext2=61, heldout=22, seconds=20),
        line(seed=0, variant="other", setting="lr 1", wikitext2=70, heldout=30, seconds="", tokens=0),
        line(seed=0, table="peers", variant="full", bits=16, wikitext2=50, heldout=10, seconds=1),
        line(seed=0, model="another", wikitext2=1, heldout=1),
    ]
    first, second = table(lines, "leads", "m").splitlines()[2:]
    gap = (math.log(20 / 10) + math.log(22 / 10)) / 2
    assert first == f"| best |  | w2g64 | 2 | 60.50 ± 0.71 | 21.00 ± 1.41 | {gap:.3f} | 2.0M | 15 |"
    assert second == f"| other | lr 1 | w2g64 | 1 | 70.00 | 30.00 | {math.log(3):.3f} |  |  |"
    with pytest.raises(ValueError, match="no line is of table leads and model absent"):
        table(lines, "leads", "absent")


def test_only_what_is_between_the_marks_changes() -> None:
    page = "before\n<!-- table leads m -->\nold\n<!-- end -->\nafter\n"
    lines = [line(seed=0, wikitext2=60, heldout=20)]
    filled = fill(page, lines)
    assert filled.startswith("before\n<!-- table leads m -->\n| ") and filled.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in filled and fill(filled, lines) == filled
