"""Whether E2E-QAT fits: refused before it begins, and what ranks share to make it fit."""

from __future__ import annotations

import torch

from formats.errors import InputError

from ..costs.estimate import qat_bytes
from ..ranks.group import joined, largest, size
from .latent_model import LatentModel
from .settings import QatSettings

__all__ = ["check_memory", "shares_teacher"]

# Ranks that a refusal may recommend.
COUNTS = (2, 4, 8, 16, 32, 64, 128)
# Of a GPU's free memory: what weights, gradients and moments may take before the teacher is shared too.
SHARE_OF_GPU = 0.7


def check_memory(weights: int, parameters: int, settings: QatSettings) -> None:
    """Refuses a model whose training state does not fit.

    Args:
        weights: in layers that are trained.
        parameters: of the whole model.
        settings: of the stage.

    Raises:
        InputError: it is a GPU with less memory free.
    """
    device = settings.resolved_device()
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    ranks = joined()
    count = 1 if ranks is None else ranks.size
    share = settings.share_weights != "off"
    needed = qat_bytes(parameters, weights, ranks=count, share_teacher=share)
    if needed <= free:
        return
    fits = (n for n in COUNTS if n > count and qat_bytes(parameters, weights, ranks=n, share_teacher=share) <= free)
    more = next((f"torchrun with {number} GPUs as this one, or " for number in fits), "")
    raise InputError(
        f"E2E-QAT keeps {needed / 2**30:.1f} GiB of weights, gradients and moments on "
        f"{'the GPU' if count == 1 else f'each of {count} GPUs'} and {free / 2**30:.1f} GiB are free; use {more}"
        "--recipe paper, which trains a block at a time"
    )


def shares_teacher(latent: LatentModel, settings: QatSettings) -> bool:
    """Whether ranks share the full-precision model's weights too; the same answer on all of them.

    Args:
        latent: the model in training, loaded; gradients and moments come on top.
        settings: of the stage.
    """
    if size() == 1 or settings.share_weights == "off":
        return False
    wanted = settings.share_weights == "on"
    device = settings.resolved_device()
    if not wanted and device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what loading has left over
        free = torch.cuda.mem_get_info(device)[0] + unused
        trained = 12 * sum(parameter.numel() for parameter in latent.parameters)
        whole = sum(linear.in_features * linear.out_features for linear in latent.linears.values())
        wanted = trained + settings.resolved_compute_dtype().itemsize * whole > SHARE_OF_GPU * free
    return bool(largest(int(wanted)))
