"""What the tests of several ranks and their worker scripts share: torchrun, a text, and what a rank saw."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eqat_train.config import TrainConfig, build_config
from eqat_train.pipeline.following import follow
from eqat_train.pipeline.train import train
from eqat_train.ranks.divergence import RanksDifferError
from eqat_train.ranks.group import joined
from eqat_train.ranks.orders import give_order
from eqat_train.ranks.together import RankLostError, run_together
from eqat_train.reporting.progress import Reporter

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the cat sat on a mat and then it ran far away from home".split()

# What this rank leaves as rank0.json or rank1.json.
seen: dict[str, Any] = {"samples": [], "said": [], "ended": {}}


def write_text(folder: Path) -> None:
    """``train.txt``: 60 documents of 50 words."""
    draw = random.Random(0)
    (folder / "train.txt").write_text("\n\n".join(" ".join(draw.choices(WORDS, k=50)) for _ in range(60)))


def launch(ranks: int, folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder under torchrun."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*start, str(Path(__file__).with_name(script)), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


def what_ranks_saw(folder: Path) -> list[dict[str, Any]]:
    """``seen`` of both ranks."""
    return [json.loads((folder / f"rank{number}.json").read_text()) for number in (0, 1)]


class Listener(Reporter):
    """Keeps what was said."""

    def message(self, text: str) -> None:
        seen["said"].append(text)


@contextmanager
def changed(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, a function is another one on rank 1."""
    before = getattr(owner, name)
    ranks = joined()
    if ranks is not None and ranks.rank:
        setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def kill_this_rank() -> None:
    """The end of rank 1, which leaves what it saw before."""
    Path("rank1.json").write_text(json.dumps(seen))
    os.kill(os.getpid(), signal.SIGKILL)


Run = Callable[..., None]


def work_as_a_rank(work: Callable[[Run], None]) -> None:
    """The main program of a worker: ``work`` is given ``run(name, out, **settings)`` and killed in its last run."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which may come before the lost connection is noticed
    settings = json.loads(sys.argv[1])

    def working(train_one: Callable[[TrainConfig], None]) -> None:
        def run(name: str, out: str, **more: Any) -> None:
            try:
                train_one(build_config(settings | more | {"out": out}))
                seen["ended"][name] = "good"
            except (KeyboardInterrupt, RanksDifferError) as error:
                seen["ended"][name] = f"{type(error).__name__}: {error}".removesuffix(": ")

        work(run)

    def lead(config: TrainConfig) -> None:
        train(config, Listener())
        give_order("end")

    try:
        run_together("cpu", lambda: working(lead), lambda: working(follow))
    except RankLostError as error:
        seen["ended"]["killed"] = str(error)
        Path("rank0.json").write_text(json.dumps(seen))
        sys.exit(2)
