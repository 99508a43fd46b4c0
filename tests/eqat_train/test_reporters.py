"""Reporters: what each shows, and that scripts get JSON and nothing else."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eqat_train.reporting.progress import Reporter
from eqat_train.reporting.reporters import (
    CompositeReporter,
    EventRecorder,
    JsonReporter,
    LineReporter,
    LogFileReporter,
    StageReporter,
    TerminalReporter,
)

BLOCK = {"index": 2, "start_val_loss": 0.5, "train_loss": 0.25, "val_loss": 0.3, "seconds": 4.2, "peak_memory": 1}
ROWS = [
    {"model": name, "perplexity": value, "bytes": 1610000, "bits_per_weight": 2.28, "sample": f" a tale of {name}"}
    for name, value in (("full precision", 5.5), ("round-to-nearest", 1234.5), ("Block-AP", 7.25), ("E2E-QP", 6.75))
]
SUMMARY: dict[str, Any] = {"rows": ROWS, "prompt": "Once upon a time, there was"}


def drive(reporter: Reporter) -> None:
    reporter.message("starting [bold]plainly[/]")
    with reporter.task("block 3/4", 10) as task:
        task.update(4, loss=0.5, lr=1e-4)
        task.update(6, loss=float("nan"))
    reporter.event("block", **BLOCK)
    reporter.event("summary", **SUMMARY)


def lines(width: int = 80) -> str:
    stream = io.StringIO()
    drive(LineReporter(Console(file=stream, width=width, highlight=False)))
    return stream.getvalue()


def test_plain_lines_have_no_bars_and_one_line_a_block() -> None:
    text = lines()
    assert "starting [bold]plainly[/]\n" in text
    assert "block 3: loss 0.25, validation 0.5 -> 0.3, 4 s\n" in text
    assert "3/4" not in text and "\x1b" not in text


@pytest.mark.parametrize("width", [60, 80])
def test_the_closing_table_fits_narrow_terminals(width: int) -> None:
    text = lines(width)
    assert all(len(line) <= width for line in text.splitlines())
    for row in ROWS:
        assert f"{row['perplexity']:.2f}" in text
        assert " ".join(text.split()).count(f"there was a tale of {row['model']}") == 1
    assert "…" not in text


def test_terminals_see_a_bar_with_loss_and_time_left_and_then_the_same_lines() -> None:
    stream = io.StringIO()
    reporter = TerminalReporter(Console(file=stream, width=80, force_terminal=True, legacy_windows=False))
    with reporter.task("block 3/4", 10) as task:
        task.update(4, loss=0.125)
        assert reporter._progress is not None
        reporter._progress.refresh()  # a thread does, ten times a second
    reporter.event("block", **BLOCK)
    text = stream.getvalue()
    assert "block 3/4" in text and "4/10" in text and "loss 0.125" in text and "--:--" in text
    assert text.rstrip().endswith("block 3: loss 0.25, validation 0.5 -> 0.3, 4 s")


def test_a_broken_models_escapes_do_not_reach_the_terminal() -> None:
    stream = io.StringIO()
    row = {**ROWS[0], "sample": "\x1b[2Jgone\x07"}
    LineReporter(Console(file=stream, width=80)).event("summary", rows=[row], prompt="x")
    assert "\x1b" not in stream.getvalue() and "\x07" not in stream.getvalue()
    assert "gone" in stream.getvalue()


def test_json_is_one_strict_object_a_line_for_everything() -> None:
    stream = io.StringIO()
    reporter = JsonReporter(stream)
    drive(reporter)
    reporter.event("e2e_step", loss=float("inf"), nested=[float("nan"), {"x": float("-inf")}])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    records = [json.loads(line, parse_constant=refuse) for line in stream.getvalue().splitlines()]
    assert [record["event"] for record in records] == [
        "message",
        "task_start",
        "task_end",
        "block",
        "summary",
        "e2e_step",
    ]
    assert records[2] == {"event": "task_end", "title": "block 3/4", "done": 10, "total": 10}
    assert records[4]["rows"] == ROWS
    assert records[5] == {"event": "e2e_step", "loss": "inf", "nested": ["nan", {"x": "-inf"}]}


def test_json_progress_is_at_most_one_record_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("eqat_train.reporting.reporters.time.monotonic", lambda: now)
    stream = io.StringIO()
    with JsonReporter(stream).task("t", 100) as task:
        for _ in range(30):
            task.update(1, loss=1.0)
            now += 0.125
    progress = [
        record for line in stream.getvalue().splitlines() if (record := json.loads(line))["event"] == "progress"
    ]
    assert [record["done"] for record in progress] == [9, 17, 25]
    assert progress[0] == {"event": "progress", "title": "t", "done": 9, "total": 100, "loss": 1.0}


def test_the_log_file_keeps_messages_events_and_the_table_with_times(tmp_path: Path) -> None:
    drive(LogFileReporter(tmp_path / "train.log"))
    text = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert "starting" in text and "round-to-nearest" in text and "1234.50" in text
    block = next(line for line in text.splitlines() if " block " in line)
    assert "index=2" in block and "val_loss=0.3" in block and block[:4].isdigit()


def test_the_recorder_keeps_events_as_json_values(tmp_path: Path) -> None:
    recorder = EventRecorder(tmp_path / "events.jsonl")
    recorder.event("block", **BLOCK, extra=float("nan"))
    (event,) = recorder.events
    assert event["event"] == "block" and event["extra"] == "nan" and event["at_seconds"] >= 0


def test_the_recorder_goes_on_after_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    EventRecorder(file).event("block", **BLOCK)
    file.write_text(file.read_text(encoding="utf-8") + '{"event": "blo', encoding="utf-8")
    EventRecorder(file).event("done")
    assert [event["event"] for event in EventRecorder(file).events] == ["block", "done"]


def test_a_composite_tells_everyone(tmp_path: Path) -> None:
    recorders = [EventRecorder(tmp_path / "a.jsonl"), EventRecorder(tmp_path / "b.jsonl")]
    stream = io.StringIO()
    drive(CompositeReporter(*recorders, JsonReporter(stream)))
    assert [len(recorder.events) for recorder in recorders] == [2, 2]
    assert '"done": 10' in stream.getvalue()


def test_a_stage_moves_one_step_for_every_event_of_its_kind() -> None:
    stream = io.StringIO()
    inner = JsonReporter(stream)
    with inner.task("Block-AP", 2) as overall:
        stage = StageReporter(inner, overall, "block")
        drive(stage)
        drive(stage)
    last = json.loads(stream.getvalue().splitlines()[-1])
    assert last == {"event": "task_end", "title": "Block-AP", "done": 2, "total": 2}
