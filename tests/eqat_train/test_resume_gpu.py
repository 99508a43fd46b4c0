"""On a GPU, runs that stop go on with the same command, to the same bytes where a rerun gives the same bytes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eqat_train.config import TrainConfig
from eqat_train.pipeline.train import train
from eqat_train.reporting.progress import Reporter

pytestmark = pytest.mark.gpu


class StopAfter(Reporter):
    """Interrupts after the first event of a kind, as Ctrl-C would."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def event(self, kind: str, **fields: Any) -> None:
        if kind == self._kind:
            os.kill(os.getpid(), 2)


@pytest.mark.parametrize("kind", ["block", "e2e_step"])
def test_a_run_that_stopped_ends_with_the_same_bytes(here: Path, config: Callable[..., TrainConfig], kind: str) -> None:
    for out in ("whole", "again"):
        train(config(out=out, device="cuda"), Reporter())
    expected, again = (Path(out, "model.safetensors").read_bytes() for out in ("whole", "again"))
    with pytest.raises(KeyboardInterrupt):
        train(config(out="stopped", device="cuda"), StopAfter(kind))
    train(config(out="stopped", device="cuda"), Reporter())
    assert Path("stopped.work").exists() is False
    if expected == again:  # attention decides, see docs/decisions.md
        assert Path("stopped", "model.safetensors").read_bytes() == expected
