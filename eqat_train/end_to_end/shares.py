"""Windows shared out over ranks, and the sum of what their shares give.

Every optimizer step has the windows of the whole batch, drawn as one process draws them; each rank computes its part of
them, with a loss that is divided by the target tokens of all. So the ranks' gradients add up to the batch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from formats.errors import InputError

from ..data import NO_LOSS, TokenWindows
from ..ranks.gradients import sum_gradients_
from ..ranks.group import current, joined, largest, own_part, size

__all__ = ["check_batch", "check_same_progress", "own_windows", "sum_step_"]


def check_batch(batch_size: int) -> None:
    """Refuses a batch that ranks cannot share.

    Raises:
        InputError: it is not a multiple of their number.
    """
    ranks = joined()
    if ranks is not None and batch_size % ranks.size:
        raise InputError(
            f"--e2e-batch {batch_size} windows a step cannot be shared evenly by {ranks.size} ranks; use --e2e-batch "
            f"{-(-batch_size // ranks.size) * ranks.size}, or a number of ranks that divides {batch_size}"
        )


def own_windows(windows: TokenWindows) -> TokenWindows:
    """This rank's part; where parts differ by a window, one without loss makes up for it: ranks go in step."""
    if size() == 1:
        return windows
    rows, wanted = torch.arange(len(windows))[own_part(len(windows))], -(-len(windows) // size())
    if len(rows) == wanted:
        return windows.take(rows)
    padded = windows.take(torch.cat([rows, rows.new_zeros(wanted - len(rows))]))
    labels = padded.labels.clone()
    labels[len(rows) :] = NO_LOSS
    return TokenWindows(padded.input_ids, labels)


def sum_step_(scales: Sequence[Tensor], loss: Tensor, stop: bool, *, sparse: bool) -> Tensor:
    """Leaves the sum of the ranks' gradients in the scales.

    Args:
        scales: every trained parameter.
        loss: this rank's part of the batch's mean loss.
        stop: this rank has been told to stop.
        sparse: a scale may have a gradient on some ranks only.

    Returns:
        ``[2]``: the batch's mean loss, and how many ranks have been told to stop.
    """
    figures = torch.stack([loss.float(), torch.full_like(loss, float(stop), dtype=torch.float32)])
    return sum_gradients_(scales, figures, sparse=sparse)


def check_same_progress(done: int, stage: str) -> None:
    """Refuses ranks that go on from different states.

    Args:
        done: steps of the state that this rank has found.
        stage: for the message.

    Raises:
        InputError: they do not see the same files.
    """
    ranks = current()
    if largest(done) != -largest(-done):
        raise InputError(
            f"rank {ranks.rank if ranks else 0} finds an unfinished {stage} of {done} steps and another rank finds "
            "something else; --work has to be one folder that every machine sees"
        )
