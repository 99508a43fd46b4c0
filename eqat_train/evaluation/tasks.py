"""Downstream tasks through EleutherAI's lm-eval harness, on a model that is already in memory.

The harness does what it always does: it builds the requests, draws the few-shot examples with its own seeds and counts
the metrics, so that a figure here is the figure its own command gives for the same model. What eqat adds is the model,
from a folder in any format it reads, and errors and progress in its own manner.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.errors import InputError, MissingExtraError

from ..reporting.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TaskResult", "TaskSettings", "check_harness", "check_names", "run_tasks"]

# Requests in a forward pass.
BATCH = 16
# Names close to a wrong one that its message suggests.
SUGGESTIONS = 3


@dataclass(frozen=True)
class TaskSettings:
    """What to run.

    Attributes:
        names: of tasks, groups or tags that the harness knows, or paths of task files (.yaml).
        include_path: folder with more task files; what they name as functions is run.
        few_shot: examples in the prompt; None leaves it to the task.
        limit: only the first so many documents of a task.
        batch: requests in a forward pass; None is 16.
        seq_len: tokens of context; None is the model's.
    """

    names: tuple[str, ...]
    include_path: Path | None = None
    few_shot: int | None = None
    limit: int | None = None
    batch: int | None = None
    seq_len: int | None = None


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task or group.

    Attributes:
        task: its name.
        metric: e.g. ``acc``.
        filter: of the answers, ``none`` as a rule.
        value: of the metric.
        stderr: of the value, by the harness; None where it has none.
        documents: how many were scored; None for a group.
        few_shot: examples in the prompt; None for a group.
        version: of the task.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    documents: int | None
    few_shot: int | None
    version: str


def check_harness() -> None:
    """Refuses to go on without the harness.

    Raises:
        MissingExtraError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", "eval", "eqat eval --tasks")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: TaskSettings,
    reporter: Reporter | None = None,
) -> list[TaskResult]:
    """Scores a model on tasks; seeds the global random generators as the harness does.

    Args:
        model: on its device, in evaluation mode.
        tokenizer: the model's.
        settings: which tasks and how.
        reporter: told of progress, and of the result as an event ``tasks``.

    Returns:
        A result for every metric, in the harness's order.

    Raises:
        MissingExtraError: lm-eval is not installed.
        InputError: an unknown task, a task file that cannot be used, or a data set that cannot be had.
    """
    check_harness()
    reporter = reporter or Reporter()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets  # noqa: PLC0415

    datasets.disable_progress_bars()
    from .harness import ReportingModel, evaluate_tasks, find_tasks  # noqa: PLC0415

    names = list(dict.fromkeys(settings.names))
    include_path = str(settings.include_path) if settings.include_path else None
    manager = find_tasks(names, include_path)
    check_names(names, manager.all_tasks)
    started = time.perf_counter()
    harness_model = ReportingModel(model, tokenizer, settings.batch or BATCH, settings.seq_len, reporter)
    results = evaluate_tasks(harness_model, manager.load(names), settings.few_shot, settings.limit)
    rows = _rows(results)
    reporter.event(
        "tasks",
        results=[asdict(row) for row in rows],
        limit=settings.limit,
        seconds=time.perf_counter() - started,
        harness=f"lm-eval {version('lm-eval')}",
    )
    return rows


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuses what is neither a known name nor a task file.

    Raises:
        InputError: with the names that come closest.
    """
    if not names:
        raise InputError("no task is named; give names with commas between them, e.g. --tasks arc_easy,piqa")
    for name in names:
        if name in known:
            continue
        if Path(name).suffix in (".yaml", ".yml"):
            if not Path(name).is_file():
                raise InputError(f"task file {name} does not exist")
            continue
        close = difflib.get_close_matches(name, known, SUGGESTIONS)
        hint = f"did you mean {' or '.join(close)}?" if close else "give --include-path for task files of your own"
        raise InputError(f"no task, group or tag is called {name}; {hint}")


def _rows(results: Any) -> list[TaskResult]:
    """One row a metric: the harness keys them ``metric,filter``, their errors ``metric_stderr,filter``."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            rows.append(
                TaskResult(
                    task=task,
                    metric=metric,
                    filter=kind,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                    documents=results.get("n-samples", {}).get(task, {}).get("effective"),
                    few_shot=results.get("n-shot", {}).get(task),
                    version=str(results.get("versions", {}).get(task, "")),
                )
            )
    return rows
