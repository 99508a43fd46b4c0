"""The README shows what the registry says."""

from __future__ import annotations

from pathlib import Path

import pytest

from eqat_export.format_table import format_rows, markdown_table
from eqat_export.runtimes import RUNTIMES
from formats import available_formats

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_formats_is_the_registrys() -> None:
    assert markdown_table(format_rows()) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("row", format_rows(), ids=lambda row: row.id)
def test_every_format_but_native_has_a_real_reader(row) -> None:
    # native's is EfficientQAT itself, whose own checkpoints are read bit for bit (test_golden.py)
    assert row.readers or row.id == "native"
    assert set(row.readers) <= set(RUNTIMES)


@pytest.mark.parametrize("format_id", list(available_formats()))
def test_every_format_is_named_in_the_changelog(format_id: str) -> None:
    assert f"`{format_id}`" in (ROOT / "CHANGELOG.md").read_text()
