"""How training shows itself: terminal, plain lines, JSON lines, log file, record of events, and several at once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from .event_text import describe_event
from .plan_table import print_plan
from .progress import Reporter, Task
from .summary import print_evaluation, print_summary, print_tasks

__all__ = [
    "CompositeReporter",
    "EventRecorder",
    "JsonReporter",
    "LineReporter",
    "LogFileReporter",
    "StageReporter",
    "TerminalReporter",
    "json_values",
]

# Seconds between two progress records of one task in JSON.
PROGRESS_INTERVAL = 1.0


class LineReporter(Reporter):
    """Plain lines on a console: messages, one line a block or stage, and the closing table."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    def message(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "summary":
            print_summary(self.console, fields)
        elif kind == "eval":
            print_evaluation(self.console, fields)
        elif kind == "plan":
            print_plan(self.console, fields)
        elif kind == "tasks":
            print_tasks(self.console, fields)
        elif line := describe_event(kind, fields):
            self.console.print(Text(line), soft_wrap=True)


class TerminalReporter(LineReporter):
    """Lines, and below them bars with loss and time left while tasks run."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._progress: Progress | None = None
        self._running = 0

    def task(self, title: str, total: int) -> Task:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
            )
            self._progress.start()
        self._running += 1
        return _Bar(self, self._progress, self._progress.add_task(title, total=total, loss=""))

    def close_task(self, task: TaskID) -> None:
        """Takes a bar away, and the whole display with the last one."""
        if self._progress is None:
            return
        self._progress.remove_task(task)
        self._running -= 1
        if not self._running:
            self._progress.stop()
            self._progress = None


class _Bar(Task):
    def __init__(self, reporter: TerminalReporter, progress: Progress, task: TaskID) -> None:
        self._reporter, self._progress, self._task = reporter, progress, task

    def update(self, advance: int = 1, **metrics: float) -> None:
        self._progress.advance(self._task, advance)
        if "loss" in metrics:
            self._progress.update(self._task, loss=f"loss {metrics['loss']:.4g}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reporter.close_task(self._task)


class JsonReporter(Reporter):
    """One JSON object a line: ``{"event": kind, ...}``; messages and tasks are events too."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def message(self, text: str) -> None:
        self.event("message", text=text)

    def event(self, kind: str, **fields: Any) -> None:
        print(json.dumps({"event": kind, **json_values(fields)}), file=self._stream, flush=True)

    def task(self, title: str, total: int) -> Task:
        self.event("task_start", title=title, total=total)
        return _JsonTask(self, title, total)


class _JsonTask(Task):
    def __init__(self, reporter: JsonReporter, title: str, total: int) -> None:
        self._reporter, self._title, self._total = reporter, title, total
        self._done = 0
        self._last = time.monotonic()

    def update(self, advance: int = 1, **metrics: float) -> None:
        self._done += advance
        if time.monotonic() - self._last >= PROGRESS_INTERVAL:
            self._last = time.monotonic()
            self._reporter.event("progress", title=self._title, done=self._done, total=self._total, **metrics)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reporter.event("task_end", title=self._title, done=self._done, total=self._total)


class LogFileReporter(Reporter):
    """Appends time-stamped lines to a file: messages, every event, and the closing table."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def message(self, text: str) -> None:
        self._write(text)

    def event(self, kind: str, **fields: Any) -> None:
        values = " ".join(f"{name}={json.dumps(value)}" for name, value in json_values(fields).items())
        if kind != "summary":
            self._write(f"{kind} {values}".rstrip())
            return
        with self._file.open("a", encoding="utf-8") as stream:
            print_summary(Console(file=stream, width=100, highlight=False, color_system=None), fields)

    def _write(self, line: str) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


class EventRecorder(Reporter):
    """Keeps every event, for the machine-readable report.

    Attributes:
        events: ``{"event": kind, "at_seconds": since the start, ...}`` each, those of earlier parts of the run first.

    Args:
        file: keeps them on disk too, one JSON object a line, so that a resumed run has all of them.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._start = time.perf_counter()
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.events: list[dict[str, Any]] = [event for event in map(_parsed, lines) if event is not None]
        if lines:  # again, without the line that was being written when the run was killed
            file.write_text("".join(json.dumps(event) + "\n" for event in self.events), encoding="utf-8")

    def event(self, kind: str, **fields: Any) -> None:
        seconds = round(time.perf_counter() - self._start, 3)
        self.events.append({"event": kind, "at_seconds": seconds, **json_values(fields)})
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.events[-1]) + "\n")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class CompositeReporter(Reporter):
    """Tells several reporters."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def message(self, text: str) -> None:
        for reporter in self._reporters:
            reporter.message(text)

    def event(self, kind: str, **fields: Any) -> None:
        for reporter in self._reporters:
            reporter.event(kind, **fields)

    def task(self, title: str, total: int) -> Task:
        return _CompositeTask([reporter.task(title, total) for reporter in self._reporters])


class _CompositeTask(Task):
    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = list(tasks)

    def update(self, advance: int = 1, **metrics: float) -> None:
        for task in self._tasks:
            task.update(advance, **metrics)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.__exit__(kind, error, trace)


class StageReporter(Reporter):
    """Passes everything on, and moves a task one step for every event of one kind.

    Args:
        inner: who is told.
        overall: the task, e.g. over all blocks.
        kind: the events that count.
    """

    def __init__(self, inner: Reporter, overall: Task, kind: str) -> None:
        self._inner, self._overall, self._kind = inner, overall, kind

    def message(self, text: str) -> None:
        self._inner.message(text)

    def event(self, kind: str, **fields: Any) -> None:
        self._inner.event(kind, **fields)
        if kind == self._kind:
            self._overall.update(1)

    def task(self, title: str, total: int) -> Task:
        return self._inner.task(title, total)


def json_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields with NaN and infinities, which JSON lacks, as strings."""
    return {name: _json_value(value) for name, value in fields.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return json_values(value)
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value
