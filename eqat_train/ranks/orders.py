"""What rank 0 tells the others, in order, and what a rank that fails tells everyone; JSON texts in torchrun's store.

Waiting looks at the store a few times a second, so Ctrl-C ends it at once, and rank 0 may measure or write for as long
as it takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from .group import Ranks, joined

__all__ = ["OtherRankFailed", "failures", "give_order", "note_failure", "orders", "wait_for_all"]

POLL_SECONDS = 0.05
_given = _taken = _meetings = 0


def give_order(kind: str, **values: Any) -> None:
    """Tells every other rank what to take part in; nothing for a process alone. To be called by rank 0.

    Args:
        kind: of the order.
        values: JSON values.
    """
    global _given  # noqa: PLW0603
    ranks = joined()
    if ranks is not None and ranks.rank == 0:
        ranks.store.set(f"order/{_given}", json.dumps({"order": kind, **values}))
        _given += 1


def orders() -> Iterator[dict[str, Any]]:
    """The orders of rank 0, as they come; ends with the order ``end``."""
    global _taken  # noqa: PLW0603
    ranks = joined()
    while ranks is not None:
        order = json.loads(_wait(ranks, f"order/{_taken}"))
        _taken += 1
        if order["order"] == "end":
            return
        yield order


def wait_for_all() -> None:
    """Returns when every rank has called it as often as this one.

    Raises:
        OtherRankFailed: a rank has failed meanwhile.
    """
    global _meetings  # noqa: PLW0603
    ranks = joined()
    if ranks is None:
        return
    _meetings += 1
    ranks.store.set(f"here/{_meetings}/{ranks.rank}", "")
    for number in range(ranks.size):
        _wait(ranks, f"here/{_meetings}/{number}")


def note_failure(text: str) -> None:
    """Tells the other ranks that this one ends, and why."""
    ranks = joined()
    if ranks is not None:
        ranks.store.set(f"failed/{ranks.rank}", text)


def failures() -> dict[int, str]:
    """Ranks other than this one that failed, and why."""
    ranks = joined()
    if ranks is None:
        return {}
    others = (number for number in range(ranks.size) if number != ranks.rank)
    found = {number: f"failed/{number}" for number in others if ranks.store.check([f"failed/{number}"])}
    return {number: ranks.store.get(key).decode() for number, key in found.items()}


class OtherRankFailed(Exception):  # noqa: N818 -- says what happened, and where
    """Another rank has failed: its number and its text."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"rank {number}: {text}")
        self.number, self.text = number, text


def _wait(ranks: Ranks, key: str) -> str:
    """A value of the store, when it is there.

    Raises:
        OtherRankFailed: a rank has failed meanwhile.
    """
    while not ranks.store.check([key]):
        for number, text in failures().items():
            raise OtherRankFailed(number, text)
        time.sleep(POLL_SECONDS)
    return ranks.store.get(key).decode()
