"""A linear layer on packed weights, trainable in its scales: ``y = x @ ((q - z) * s).T + bias``.

The dequantized weight lives only inside the call: backward keeps the packed words, the scales and ``x``, and
dequantizes again. There is no gradient for the packed integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import run
from ..packed import PackedWeight
from .autograd import trained_linear

__all__ = ["dequant_matmul"]


def dequant_matmul(
    x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Output of the layer, differentiable in ``x``, ``scales`` and ``bias``.

    The weight is ``(q - z) * s`` in the dtype of ``scales``, rounded once to the dtype of ``x``; both matmuls with it
    and ``dY^T X`` run in the dtype of ``x``; the scales' gradient is reduced in float32 (float64 for a float64 ``x``)
    and returned in the dtype of ``scales``.

    Args:
        x: floating ``[..., in]``.
        packed: codes and zero-points.
        scales: float32 (or float64) ``[groups, out]``.
        bias: ``[out]`` in the dtype of ``x``, or None.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scales, bias))
    if trained and (impl == "triton" or (impl == "auto" and x.device.type == "cuda")):
        return trained_linear(x, packed, scales, bias, impl)
    return run("dequant_matmul", impl, x.device, x, packed, scales, bias)
