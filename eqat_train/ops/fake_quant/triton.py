"""Launches the kernels of :mod:`.kernels`; the same call and the same numbers as the reference, bit for bit forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import backward_kernel, forward_kernel

__all__ = ["fake_quant", "gradients", "on_device", "quantizer", "refusal", "tile"]

# Fixed, not tuned: 512 to 2048 elements, eight or more a thread, all stream at 96 % of copy bandwidth on an H200.
ELEMENTS = 2048
WARPS = 4
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def refusal(
    weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, width: int, scale_dtype: torch.dtype, dtype: torch.dtype
) -> str | None:
    """Why the kernels cannot compute this, or None."""
    for name, value in (("scale_dtype", scale_dtype), ("dtype", dtype)):
        if value not in _DTYPES:
            return f"{name} is {value}; the kernel knows float16, bfloat16 and float32"
    return None


def fake_quant(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    width: int,
    scale_dtype: torch.dtype,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See :func:`eqat_train.ops.fake_quant.fake_quant`; ``width`` is the group's width, never -1."""
    result: Tensor = _FakeQuant.apply(weight, scales, zeros, bits, width, scale_dtype, dtype)
    return result


def tile(width: int, elements: int = ELEMENTS) -> dict[str, int]:
    """Rows and columns of a program's tile of groups, powers of two of about ``elements`` together."""
    columns = min(triton.next_power_of_2(width), elements)
    return {"ROWS": elements // columns, "COLUMNS": columns}


def quantizer(bits: int, width: int, scale_dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments that say how a group is quantized."""
    limits = torch.finfo(scale_dtype)
    return {
        "WIDTH": width,
        "MAXQ": float(2**bits - 1),
        "SCALE_DTYPE": _DTYPES[scale_dtype],
        "SCALE_LOWEST": limits.tiny,
        "SCALE_HIGHEST": limits.max,
    }


def on_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    return cast(AbstractContextManager[None], torch.cuda.device(tensor.device)) if tensor.is_cuda else nullcontext()


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bits: int,
        width: int,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        weight, scales, zeros = weight.contiguous(), scales.contiguous(), zeros.contiguous()
        ctx.save_for_backward(weight, scales, zeros)
        ctx.quantizer = quantizer(bits, width, scale_dtype)
        output = torch.empty_like(weight, dtype=dtype)
        shape = tile(width)
        grid = (triton.cdiv(scales.numel(), shape["ROWS"]),)
        with on_device(weight):
            forward_kernel[grid](
                weight, scales, zeros, output, scales.numel(), **ctx.quantizer, **shape, num_warps=WARPS
            )
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales, zeros = ctx.saved_tensors
        results = gradients(weight, scales, zeros, grads[0], ctx.quantizer, ctx.needs_input_grad[:3])
        return *results, None, None, None, None


def gradients(
    weight: Tensor, scales: Tensor, zeros: Tensor, gradient: Tensor, group: dict[str, Any], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of weight, scales and zeros, None where not needed; ``group`` is from :func:`quantizer`."""
    results = [
        torch.empty_like(tensor) if need else None for tensor, need in zip((weight, scales, zeros), needed, strict=True)
    ]
    shape = tile(group["WIDTH"])
    with on_device(weight):
        backward_kernel[(triton.cdiv(scales.numel(), shape["ROWS"]),)](
            weight,
            scales,
            zeros,
            gradient.contiguous(),
            *results,
            scales.numel(),
            NEED_WEIGHT=needed[0],
            NEED_SCALES=needed[1],
            NEED_ZEROS=needed[2],
            **group,
            **shape,
            num_warps=WARPS,
        )
    return results
