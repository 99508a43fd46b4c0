"""Other libraries' errors in one line."""

from __future__ import annotations

__all__ = ["first_line"]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
