"""What eqat uses of lm-eval, and extends; importing this module imports lm-eval."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from datasets.exceptions import DatasetsError
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from formats.errors import InputError

from ..reporting.progress import Reporter, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HarnessTasks", "ReportingModel", "evaluate_tasks", "find_tasks"]

# The harness's own seeds: of Python's generator, and of all others, the draw of few-shot examples among them.
SEED_PYTHON = 0
SEED = 1234


class HarnessTasks(TaskManager):
    """Tasks by name or file; one that cannot be loaded is the user's to know of, in one line."""

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except (DatasetsError, ImportError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as exc:
            reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
            raise InputError(
                f"the tasks {', '.join(map(str, task_list))} cannot be loaded: {reason}. Their data comes from the "
                "Hugging Face hub unless the task file names a local one (dataset_path: json, data_files: ...)"
            ) from exc


def find_tasks(names: Sequence[str], include_path: str | None) -> HarnessTasks:
    """The tasks of a folder if it has all that are named, else those of the harness too, which take seconds to index.

    A group or a file may name tasks of the harness, so only names of single tasks can do without.
    """
    if include_path:
        own = HarnessTasks(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return HarnessTasks(include_path=include_path)


def evaluate_tasks(model: ReportingModel, loaded: Any, few_shot: int | None, limit: int | None) -> Any:
    """The harness's evaluation of loaded tasks with its own defaults and seeds.

    Its ``simple_evaluate`` does the same and then describes the machine, for which it runs git and pip.

    Args:
        model: to score.
        loaded: what ``HarnessTasks.load`` gave; the tasks' few-shot settings are changed.
        few_shot: examples in a prompt, but for tasks that say 0 themselves; None leaves it to the tasks.
        limit: documents of a task.

    Returns:
        The harness's results.
    """
    random.seed(SEED_PYTHON)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if few_shot is not None and own != 0:
            task.set_config(key="num_fewshot", value=few_shot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return evaluate(model, loaded, limit=limit, log_samples=False)


class ReportingModel(HFLM):
    """The harness's model, with progress told to a reporter instead of bars."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: int,
        seq_len: int | None,
        reporter: Reporter,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, max_length=seq_len)
        self._reporter, self._task, self._left = reporter, Task(), 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self._progress("scoring answers", requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self._progress("scoring texts", requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self._progress("generating answers", requests):
            return super().generate_until(requests, disable_tqdm=True)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = super()._model_call(inps, *args, **kwargs)
        self._advance(inps.shape[0])
        return result

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = super()._model_generate(context, *args, **kwargs)
        self._advance(context.shape[0])
        return result

    @contextmanager
    def _progress(self, title: str, requests: Sequence[Any]) -> Iterator[None]:
        self._left = len(requests)
        with self._reporter.task(title, len(requests)) as self._task:
            yield
            self._advance(self._left)

    def _advance(self, rows: int) -> None:
        """Rows of a pass are not quite requests: some share a row, and a long text has several."""
        rows = min(rows, self._left)
        self._left -= rows
        self._task.update(rows)
