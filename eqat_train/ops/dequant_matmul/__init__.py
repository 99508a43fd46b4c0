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
from .operator import packed_linear

__all__ = ["dequant_matmul"]


def dequant_matmul(
    x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Output of the layer, differentiable in ``x``, ``scales`` and ``bias``.

    The weight is ``(q - z) * s`` in float32 (float64 for such scales), rounded once to the dtype of ``x``; both matmuls
    with it and ``dY^T X`` run in the dtype of ``x``. The scales' gradient is reduced in float32 (float64 for a float64
    ``x``) and returned in the dtype of ``scales``. The kernels for up to 16 rows of ``x`` do not round the weight: they
    apply scales and zero-points to float32 sums.

    Args:
        x: floating ``[..., in]``.
        packed: codes and zero-points.
        scales: floating ``[groups, out]``; training has them in float32.
        bias: ``[out]`` in the dtype of ``x``, or None.
        impl: see :mod:`eqat_train.ops.dispatch`.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scales, bias))
    if trained and (impl == "triton" or (impl == "auto" and x.device.type == "cuda")):
        return trained_linear(x, packed, scales, bias, impl)
    if torch.compiler.is_compiling() and not trained:
        return packed_linear(
            x, packed.qweight, packed.qzeros, scales, bias, packed.g_idx, packed.bits, packed.group_size, impl
        )
    return run("dequant_matmul", impl, x.device, x, packed, scales, bias)
