"""Block-AP on tiny models, for tests: a run, what watches it, and what it wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eqat_train.block_ap import BlockApReport, BlockApSettings, run_block_ap
from eqat_train.reporting.progress import Reporter, Task
from formats import QuantScheme
from tests.tiny_models import tiny_tokens

SCHEME = QuantScheme(2, 32)
# Random tiny models need larger steps than the paper's rates to move in sixteen of them.
FAST = {"lr_weight": 1e-3, "lr_scale": 1e-3, "lr_zero": 1e-2, "device": "cpu"}


class Watcher(Reporter):
    """Calls a function at every step, and keeps the events."""

    def __init__(self, at_step: Callable[[], None] = lambda: None) -> None:
        self.at_step, self.events = at_step, []
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def task(self, title: str, total: int) -> Task:
        watcher = self

        class Watching(Task):
            def update(self, advance: int = 1, **metrics: float) -> None:
                watcher.at_step()

        return Watching()


def train_block_ap(
    model: Path,
    root: Path,
    *,
    scheme: QuantScheme = SCHEME,
    reporter: Reporter | None = None,
    out: str = "out",
    samples: int = 16,
    **options: Any,
) -> BlockApReport:
    settings = BlockApSettings(scheme, **{**FAST, **options})
    return run_block_ap(
        model,
        tiny_tokens(samples),
        tiny_tokens(5, seed=1),
        settings,
        root / out,
        work_dir=root / "work",
        reporter=reporter or Reporter(),
    )


def fingerprint(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
