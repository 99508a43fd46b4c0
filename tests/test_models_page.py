"""docs/models.md says what happens: every family is trained, exported and verified again."""

from __future__ import annotations

from pathlib import Path

import pytest
from models_table import FAMILIES, FORMATS, REFUSED, family_row, refused_row

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
ANEW = "write it anew: python -m tests.models_table --write docs/models.md"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return PAGE.read_text(encoding="utf-8").partition("<!-- made -->\n")[2].splitlines()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_becomes_of_a_family(family: str, lines: list[str], tmp_path: Path) -> None:
    for extra in ("onnx", "gguf"):
        pytest.importorskip(extra)
    row = family_row(family, tmp_path)
    assert "**no**" not in row
    assert row in lines, ANEW


@pytest.mark.parametrize("family", REFUSED)
def test_the_page_says_why_a_family_is_not_trained(family: str, lines: list[str], tmp_path: Path) -> None:
    assert refused_row(family, tmp_path) in lines, ANEW


def test_the_page_has_no_other_rows(lines: list[str]) -> None:
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 2 + len(FAMILIES) + len(REFUSED), ANEW
    assert all(f" {format_id} |" in rows[0] for format_id in FORMATS)
