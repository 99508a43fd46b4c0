"""Triton's interpreter with the GPU's rounding: by itself it cuts fp32 off to bfloat16, where GPUs round to even."""

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
    """Casts from fp32 to bfloat16 round to nearest, ties to even; nothing changes for compiled kernels."""
    import triton.language as tl  # noqa: PLC0415
    from triton.runtime import interpreter  # noqa: PLC0415

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, src, dst_type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding)
        patch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", rounding)
        yield
