"""Triton's interpreter with bfloat16 as GPUs have it.

By itself it cuts fp32 off to bfloat16, where GPUs round to even, and its ``tl.dot`` takes bfloat16's bits for integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

__all__ = ["rounding_to_bfloat16"]


@contextmanager
def rounding_to_bfloat16() -> Iterator[None]:
    """Casts to bfloat16 round to nearest, ties to even; products are of its values. Compiled kernels do not change."""
    import triton.language as tl  # noqa: PLC0415
    from triton.runtime import interpreter  # noqa: PLC0415

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, src, dst_type)

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        values = torch.from_numpy(np.ascontiguousarray(operand.data)).view(torch.bfloat16).float().numpy()
        return interpreter.TensorHandle(values, tl.float32)

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", product)
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding)
        patch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", rounding)
        yield
