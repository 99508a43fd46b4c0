"""What each of two ranks does for ``test_ranks.py``: several runs in one process group, and its end.

    torchrun --nproc-per-node 2 rank_worker.py SETTINGS_JSON

Works in the current folder. Each rank leaves ``rank0.json`` or ``rank1.json`` with what it saw: the hidden states it
held, what was said, and how the runs that cannot succeed ended. Rank 1 ends all by killing itself in a fifth run.
"""

import os
import signal
from typing import Any

import torch
from ranks_of_a_test import Run, changed, kill_this_rank, seen, work_as_a_rank

from eqat_train.block_ap import run as block_ap_run
from eqat_train.block_ap.activations import ActivationStore
from eqat_train.e2e_qp.shared_words import SharedWords
from eqat_train.e2e_qp.trainer import Trainer
from eqat_train.ranks import gradients

# Ranks see fewer tokens of an expert than it takes to be trained, and together enough.
MIXTURE = {"model": "mixtral", "min_expert_tokens": 100}
shared: list[SharedWords] = []
overlapped: list[int] = []


def held(words: SharedWords) -> tuple[int, int, int]:
    """Bytes of the words that this rank keeps, of all words, and of those that are gathered now."""
    shapes = [shape.numel() for pair in words._shapes for shape in pair]
    gathered = sum(tensor.nbytes for pair in words._here.values() for tensor in pair)
    return sum(linear.qweight.nbytes for linear in words._linears), 4 * sum(shapes), gathered


def interrupted_in_the_second_step(step: Any) -> Any:
    def wrapper(trainer: Trainer, *args: Any) -> Any:
        if len(trainer.losses) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *args)

    return wrapper


def with_a_flipped_bit(train_block: Any) -> Any:
    def wrapper(block: Any, *args: Any) -> Any:
        losses = train_block(block, *args)
        with torch.no_grad():
            next(iter(block.linears.values())).weight.view(torch.int32)[3, 5] ^= 1
        return losses

    return wrapper


def killed(train_block: Any) -> Any:
    return lambda *args: kill_this_rank()


def work(ends: Run) -> None:
    make = ActivationStore.__init__

    def noted(store: ActivationStore, shape: Any, *args: Any) -> None:
        seen["samples"].append(shape[0])
        make(store, shape, *args)

    ActivationStore.__init__ = noted  # type: ignore[method-assign]
    ends("whole", "whole")
    ActivationStore.__init__ = make  # type: ignore[method-assign]
    ends("resumed", "resumed")
    ends("mixture", "mixture", **MIXTURE)
    make_words = SharedWords.__init__
    SharedWords.__init__ = lambda words, ranks: shared.append(words) or make_words(words, ranks)  # type: ignore
    ends("shared", "shared", e2e_share="on")
    (words,) = shared
    seen["shared"] = {"gathers": words.gathers, "ahead": words.ahead, "held": held(words)}
    # From here on each gradient is reduced by itself, beside backward: two numbers have one sum, so the bytes stay.
    gradients.LARGE, made = 1, gradients.GradientMean._made
    gradients.GradientMean._made = lambda mean, leaf: overlapped.append(1) or made(mean, leaf)  # type: ignore
    with changed(Trainer, "_step", interrupted_in_the_second_step):
        ends("stopped", "stopped")
    ends("gone on", "stopped")
    seen["overlapped"] = len(overlapped)
    with changed(block_ap_run, "train_block", with_a_flipped_bit):
        ends("flipped", "flipped")
    with changed(block_ap_run, "train_block", killed):
        ends("killed", "killed")


if __name__ == "__main__":
    work_as_a_rank(work)
