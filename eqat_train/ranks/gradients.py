"""The mean of the ranks' gradients, left in the leaves' ``grad``.

Large gradients are reduced one by one as backward makes them, beside the rest of backward; small ones together in one
flat buffer. Ranks reduce in one order, that of the leaves from the last to the first, whichever is ready first, so a
CUDA graph can hold the reductions too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from .group import Ranks, current

__all__ = ["GradientMean", "gradient_mean", "sum_gradients_"]

# Elements from which a gradient is reduced alone: beyond it a reduction's latency no longer counts.
LARGE = 2**22


def gradient_mean(leaves: Iterable[Tensor], *, sparse: bool) -> GradientMean | None:
    """What makes the ranks' gradients one; None for a process alone.

    Args:
        leaves: the same on every rank.
        sparse: a leaf may have a gradient on some ranks only, as an expert that only some ranks' tokens go to.
    """
    ranks = current()
    return None if ranks is None else GradientMean(ranks, list(leaves), sparse)


def sum_gradients_(leaves: Sequence[Tensor], figures: Tensor, *, sparse: bool) -> Tensor:
    """Leaves the sum of the ranks' gradients in ``grad``; for gradients small enough to be one buffer.

    Args:
        leaves: float32.
        figures: float32 ``[n]``, summed with them.
        sparse: see :func:`gradient_mean`.

    Returns:
        The sum of the ranks' figures; what was given in a process alone.
    """
    ranks = current()
    if ranks is None:
        return figures
    used = _used_anywhere(ranks, leaves) if sparse else [leaf for leaf in leaves if leaf.grad is not None]
    grads = [cast(Tensor, leaf.grad) for leaf in used]
    flat = torch.cat([figures, *(grad.reshape(-1) for grad in grads)])
    dist.all_reduce(flat)
    figures, *parts = flat.split([len(figures), *(grad.numel() for grad in grads)])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))
    return figures


def _used_anywhere(ranks: Ranks, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Leaves with a gradient on any rank; on the others it becomes zero."""
    found = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.int32).to(ranks.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    used = [leaf for leaf, anywhere in zip(leaves, found.tolist(), strict=True) if anywhere]
    for leaf in used:
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
    return used


class GradientMean:
    """See :func:`gradient_mean`. Backward comes first, then ``finish``, in every step."""

    def __init__(self, ranks: Ranks, leaves: Sequence[Tensor], sparse: bool) -> None:
        self._ranks, self._leaves, self._sparse = ranks, [leaf for leaf in leaves if leaf.requires_grad], sparse
        alone = [] if sparse else [leaf for leaf in reversed(self._leaves) if leaf.numel() >= LARGE]
        self._alone = alone
        self._ready: set[Tensor] = set()
        self._running: list[tuple[Tensor, dist.Work]] = []
        self._handles = [leaf.register_post_accumulate_grad_hook(self._made) for leaf in alone]
        # NCCL divides before it adds; gloo cannot.
        self._operation = dist.ReduceOp.AVG if ranks.backend == "nccl" else dist.ReduceOp.SUM

    def finish(self) -> None:
        """To be called after backward: from now on every ``grad`` is the ranks' mean."""
        self._launch(waiting=False)
        done = {leaf for leaf, _ in self._running}
        self._reduce_together([leaf for leaf in self._used() if leaf not in done])
        for leaf, work in self._running:
            work.wait()
            self._divide(cast(Tensor, leaf.grad))
        self._running.clear()
        self._ready.clear()

    def close(self) -> None:
        """Leaves the leaves alone."""
        for handle in self._handles:
            handle.remove()

    def _made(self, leaf: Tensor) -> None:
        self._ready.add(leaf)
        self._launch(waiting=True)

    def _launch(self, *, waiting: bool) -> None:
        """Starts reducing what is ready, in order, up to the first that is not; at last past what has no gradient."""
        for leaf in self._alone[len(self._running) :]:
            if leaf not in self._ready:
                if waiting:
                    return
                continue
            self._running.append((leaf, dist.all_reduce(cast(Tensor, leaf.grad), self._operation, async_op=True)))

    def _used(self) -> list[Tensor]:
        """Leaves with a gradient on any rank; where this one has none it is zero."""
        if not self._sparse:
            return [leaf for leaf in self._leaves if leaf.grad is not None]
        return _used_anywhere(self._ranks, self._leaves)

    def _reduce_together(self, leaves: Sequence[Tensor]) -> None:
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            grads = [cast(Tensor, leaf.grad) for leaf in leaves if leaf.dtype == dtype]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, self._operation)
            self._divide(flat)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def _divide(self, values: Tensor) -> None:
        if self._operation == dist.ReduceOp.SUM:
            values.div_(self._ranks.size)
