"""Hands the parts of a model to workers, and gives places to what they encoded in the order of the parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from eqat_export.encoding import PartReport
from eqat_export.parallel.channel import (
    Channel,
    ChannelClosedError,
    error_of,
    header_of,
    place_text,
    ready,
    report_of,
)
from formats.pieces import Header, Place

__all__ = ["Task", "Team", "spread"]

_AHEAD = 2  # parts that a worker has at a time: the one it works on, and the next


class Team(Protocol):
    """Workers, and what to say when one of them is gone.

    Attributes:
        channels: one to each.
    """

    channels: list[Channel]

    def loss(self, channel: Channel) -> Exception:
        """The error to raise where a worker's channel closed."""


@dataclass(frozen=True)
class Task:
    """One part of the model to be written.

    Attributes:
        name: the layer's module path, or the tensor's full name.
        kind: ``layer``, or ``tensor`` of no quantized layer.
        memory: bytes that it takes from when it is begun until it is written, about.
        unchanged: what is noted of a tensor whose bytes are copied as they are; None where it is encoded.
    """

    name: str
    kind: Literal["layer", "tensor"]
    memory: int
    unchanged: Header | None = None


@dataclass
class _Part:
    """A task that somebody has."""

    task: Task
    owner: Channel
    report: PartReport | None = None
    headers: Sequence[Header] = ()
    error: Exception | None = None
    placed: bool = False

    @property
    def encoded(self) -> bool:
        return self.report is not None or self.error is not None


def spread(
    tasks: Iterable[Task],
    team: Team,
    reserve: Callable[[Header], Place],
    memory: int,
    expect: Callable[[str], None],
) -> Iterator[PartReport]:
    """Has the tasks done, whatever worker is free.

    Args:
        tasks: in the order in which they are written.
        team: who does them.
        reserve: room in the output; called in the order of the tasks.
        memory: bytes that tasks under way may take together; one is always under way.
        expect: called with the name of each task as it is handed out, which is before somebody has time for it.

    Yields:
        what each task did, in their order, once it has its place; when it ends, everything is written.

    Raises:
        Exception: what a task raised, in its turn; what writing raised, at once; what the team says to a loss.
    """
    waiting, parts = deque(enumerate(tasks)), dict[int, _Part]()
    turn = 0
    try:
        while waiting or parts:
            _hand_out(waiting, parts, team.channels, memory, expect)
            while turn in parts and parts[turn].encoded:
                yield _place(turn, parts[turn], reserve)
                turn += 1
                _hand_out(waiting, parts, team.channels, memory, expect)
            for channel in ready(team.channels):
                _take(channel, parts)
    except ChannelClosedError as exc:
        lost = next(channel for channel in team.channels if channel.name == str(exc))
        raise team.loss(lost) from exc


def _hand_out(
    waiting: deque[tuple[int, Task]],
    parts: dict[int, _Part],
    channels: Sequence[Channel],
    memory: int,
    expect: Callable[[str], None],
) -> None:
    """Gives tasks to whoever has the fewest, as long as somebody has room and memory allows."""
    while waiting:
        index, task = waiting[0]
        loads = {channel.name: 0 for channel in channels}
        for part in parts.values():
            loads[part.owner.name] += 1
        free = min(channels, key=lambda channel: loads[channel.name])
        held = sum(part.task.memory for part in parts.values())
        if loads[free.name] >= _AHEAD or (held and held + task.memory > memory):
            return
        waiting.popleft()
        parts[index] = part = _Part(task, free)
        if task.unchanged is None:
            free.send({"encode": index, "name": task.name, "kind": task.kind})
            expect(task.name)
        else:
            part.report, part.headers = PartReport(task.name, nbytes=task.unchanged.nbytes), [task.unchanged]


def _place(index: int, part: _Part, reserve: Callable[[Header], Place]) -> PartReport:
    """Tells a part's owner where to write it."""
    if part.error is not None:
        raise part.error
    assert part.report is not None
    places = [place_text(reserve(header)) for header in part.headers]
    if part.task.unchanged is None:
        part.owner.send({"write": index, "places": places})
    else:
        part.owner.send({"copy": index, "name": part.task.name, "place": places[0]})
    part.placed = True
    return part.report


def _take(channel: Channel, parts: dict[int, _Part]) -> None:
    """Takes one answer into account."""
    answer = channel.receive()
    if "written" in answer:
        del parts[answer["written"]]
        return
    part = parts[answer["encoded"] if "encoded" in answer else answer["failed"]]
    if "encoded" in answer:
        part.report, part.headers = report_of(answer["report"]), [header_of(text) for text in answer["headers"]]
        return
    part.error = error_of(answer["error"])
    if part.placed:
        raise part.error
