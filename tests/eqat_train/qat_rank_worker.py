"""What each of two ranks does for ``test_qat_ranks.py``: several runs of E2E-QAT in one process group, and its end.

    torchrun --nproc-per-node 2 qat_rank_worker.py SETTINGS_JSON

Works in the current folder. Each rank leaves ``rank0.json`` or ``rank1.json`` with what it saw: how much it held, what
was said, and how the runs that cannot succeed ended. Rank 1 ends all by killing itself in the last one.
"""

import os
import signal
from functools import partial
from typing import Any

import torch
from ranks_of_a_test import Run, changed, kill_this_rank, seen, work_as_a_rank
from torch import nn

from eqat_train.e2e_qat import sum_step
from eqat_train.e2e_qat import trainer as qat_trainer
from eqat_train.e2e_qat.latent_model import LatentModel
from eqat_train.e2e_qat.row_linear import RowLinear
from eqat_train.e2e_qat.trainer import QatTrainer

# Two tokens a window, two windows a step: experts that one rank, or no rank, has a token for.
MIXTURE = {"model": "olmoe", "e2e_seq_len": 2, "e2e_batch": 2, "overrides": {}}


def held(trainer: QatTrainer) -> dict[str, int]:
    """Values that this rank holds, and how many there are."""
    latent: LatentModel = trainer.latent
    shared = [parameter for parameter in latent.parameters if parameter in latent.rows]
    layers = latent.linears.values()
    linears = [module for module in trainer.teacher.modules() if isinstance(module, nn.Linear)]
    return {
        "own": sum(parameter.numel() for parameter in shared),
        "all": sum(layer.out_features * (layer.in_features + 2 * layer.scales.shape[1]) for layer in layers),
        "whole": sum(parameter.numel() for parameter in latent.parameters if parameter not in latent.rows),
        "teacher's own": sum(linear.weight.numel() for linear in linears),
        "teacher's all": sum(linear.in_features * linear.out_features for linear in linears),
        "teacher's in rows": sum(isinstance(linear, RowLinear) for linear in linears),
    }


def interrupted_in_the_third_step(step: Any, *, by_a_signal: bool = True) -> Any:
    def wrapper(trainer: QatTrainer, *args: Any) -> Any:
        if len(trainer.losses) == 1:  # they are read a step late
            if by_a_signal:
                os.kill(os.getpid(), signal.SIGINT)
            else:  # a process takes one: it has to end within half a minute
                trainer._stop._received = signal.SIGINT
        return step(trainer, *args)

    return wrapper


def killed(step: Any) -> Any:
    def wrapper(trainer: QatTrainer, *args: Any) -> Any:
        if trainer.losses:
            kill_this_rank()
        return step(trainer, *args)

    return wrapper


def work(ends: Run) -> None:
    make = QatTrainer.__init__

    def noted(trainer: QatTrainer, *args: Any) -> None:
        make(trainer, *args)
        seen.setdefault("held", []).append(held(trainer))

    QatTrainer.__init__ = noted  # type: ignore[method-assign]
    ends("whole", "whole")
    ends("shared", "shared", e2e_share="on")
    QatTrainer.__init__ = make  # type: ignore[method-assign]
    # one rank finds that it has to recompute, so both do
    with changed(QatTrainer, "_recomputes", lambda recomputes: lambda trainer, tokens: True):
        ends("recomputed", "recomputed", e2e_share="on")
    drop, dropped = sum_step._drop_unused, []

    def counted(latent: LatentModel, device: torch.device) -> None:
        drop(latent, device)
        dropped.append(sum(layer.weight.grad is None for layer in latent.linears.values()))

    sum_step._drop_unused = counted
    ends("mixture", "mixture", **MIXTURE)
    seen["dropped"] = dropped
    ends("resumed", "resumed")
    with changed(QatTrainer, "_step", partial(interrupted_in_the_third_step, by_a_signal=False)):
        ends("handed over", "handed over")
    with changed(QatTrainer, "_step", interrupted_in_the_third_step):
        ends("stopped", "stopped")
    ends("gone on", "stopped")
    qat_trainer.SAVE_SECONDS = 0  # rank 0 wants it after every step, whatever the others' clocks say
    with changed(QatTrainer, "_step", killed):
        ends("killed", "killed")


if __name__ == "__main__":
    work_as_a_rank(work)
