"""Sizes as people write them."""

from __future__ import annotations

from .errors import InputError

__all__ = ["parse_size"]

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes from ``500MB``, ``5GB``, ``2GiB`` or a plain number.

    Raises:
        InputError: not such a size.
    """
    number = text.strip().rstrip("bBiIkKmMgG")
    unit = text.strip()[len(number) :].upper() or "B"
    if not number.strip().replace(".", "", 1).isdecimal() or unit not in UNITS or float(number) <= 0:
        raise InputError(f"size {text!r}: give a positive number with MB or GB, e.g. --shard-size 5GB")
    return max(int(float(number) * UNITS[unit]), 1)
