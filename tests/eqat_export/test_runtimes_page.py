"""docs/runtimes.md says what the rules say."""

from pathlib import Path

from eqat_export.lint import ENGINES
from eqat_export.lint.table import tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runtimes.md"


def test_the_page_is_made_from_the_rules() -> None:
    written = PAGE.read_text(encoding="utf-8").partition("<!-- made -->\n")[2].lstrip("\n")
    assert written == tables(), "write it anew: python -m eqat_export.lint.table --write docs/runtimes.md"


def test_every_engine_has_its_rules_there() -> None:
    assert all(f"### {engine} " in PAGE.read_text(encoding="utf-8") for engine in ENGINES)
