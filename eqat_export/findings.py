"""What a check found: severity, place, and one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "error", "failed", "note", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing a check found.

    Attributes:
        severity: ``error`` fails the verification; ``warning`` may matter to a reader; ``note`` is for information.
        where: tensor, layer or file.
        text: one sentence.
    """

    severity: Literal["error", "warning", "note"]
    where: str
    text: str


def error(where: str, text: str) -> Finding:
    """A defect or a difference."""
    return Finding("error", where, text)


def warning(where: str, text: str) -> Finding:
    """Something that some readers stumble over."""
    return Finding("warning", where, text)


def note(where: str, text: str) -> Finding:
    """Information."""
    return Finding("note", where, text)


def failed(findings: list[Finding]) -> bool:
    """True when any finding is an error."""
    return any(finding.severity == "error" for finding in findings)
