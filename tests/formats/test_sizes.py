"""Sizes as people write them."""

import pytest

from formats.errors import InputError
from formats.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("500MB", 500_000_000), ("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 kb", 1500), ("4096", 4096), ("1KiB", 1024)],
)
def test_numbers_and_units_become_bytes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 TB", "1..5GB", "five"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="5GB"):
        parse_size(text)
