"""What ranks make of their gradients before AdamW: one batch's gradient, its norm, and what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from ..ranks.gradients import sum_gradients_
from ..ranks.group import current
from .fake_quant_rows import FakeQuantRows
from .latent_model import LatentModel

__all__ = ["StepFigures", "sum_and_clip_"]


@dataclass(frozen=True)
class StepFigures:
    """What a step is worth to know.

    Attributes:
        loss: of the batch, before the step.
        grad_norm: of the batch's gradient, before clipping.
        stopping: a rank has been told to stop.
        saving: rank 0 wants the state to be saved.
    """

    loss: float
    grad_norm: float
    stopping: bool
    saving: bool

    @staticmethod
    def read(values: Tensor) -> StepFigures:
        """From what :func:`sum_and_clip_` returns; waits for the device."""
        loss, norm, stopping, saving = values.tolist()
        return StepFigures(loss, norm, stopping > 0, saving > 0)


def sum_and_clip_(
    latent: LatentModel, loss: Tensor, max_norm: float, *, stopping: bool, saving: bool, sparse: bool
) -> Tensor:
    """Leaves the batch's clipped gradient in ``grad``: of this rank's rows, and of what every rank holds.

    Rows' gradients are summed over the ranks already, by backward. What is whole on every rank is summed here, with all
    figures in one reduction.

    Args:
        latent: after backward, gradients handed over.
        loss: this rank's part of the batch's loss, float32.
        max_norm: of the gradient of all parameters of the model.
        stopping: this rank has been told to stop.
        saving: this rank wants the state to be saved.
        sparse: a parameter may have a gradient on some ranks only.

    Returns:
        float32 ``[4]`` on the device, see :class:`StepFigures`.
    """
    ranks = current()
    flags = loss.new_tensor([float(stopping), float(saving)])
    if ranks is None:
        return torch.stack([loss, clip_grad_norm_(latent.parameters, max_norm), *flags])
    if sparse:
        _drop_unused(latent, ranks.device)
    rows = latent.rows
    shared = [parameter.grad for parameter in latent.parameters if parameter in rows and parameter.grad is not None]
    whole = [parameter for parameter in latent.parameters if parameter not in rows]
    squares = get_total_norm([grad for grad in shared if grad.numel()]).to(loss.device).square()
    figures = sum_gradients_(whole, torch.stack([loss, squares, *flags]), sparse=sparse)
    own = get_total_norm([parameter.grad for parameter in whole if parameter.grad is not None]).to(loss.device)
    norm = (figures[1] + own.square()).sqrt()
    clip_grads_with_norm_(latent.parameters, max_norm, norm)
    return torch.stack([figures[0], norm, *figures[2:]])


def _drop_unused(latent: LatentModel, device: torch.device) -> None:
    """Takes the gradients, all zero, from layers that no rank's tokens came to: AdamW leaves them alone then."""
    layers = [layer for layer in latent.linears.values() if isinstance(layer, FakeQuantRows)]
    used = torch.tensor([layer.used for layer in layers], dtype=torch.int32).to(device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for layer, anywhere in zip(layers, used.tolist(), strict=True):
        layer.used = False
        if not anywhere:
            layer.weight.grad = layer.scales.grad = layer.zeros.grad = None
