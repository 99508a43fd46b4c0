"""Settings that E2E-QP and E2E-QAT share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from formats.errors import InputError
from formats.types import SCALE_DTYPES

from ..training_settings import ComputeSettings, check_integers, check_numbers

__all__ = ["EndToEndSettings"]


@dataclass(frozen=True, kw_only=True)
class EndToEndSettings(ComputeSettings):
    """How a whole model is trained.

    Attributes:
        epochs: passes over the data.
        batch_size: windows an optimizer step.
        micro_batch_size: windows a forward pass; None chooses by memory.
        warmup_ratio: share of the steps with a rising learning rate.
        max_grad_norm: global norm that the gradient is clipped to; infinity switches clipping off.
        weight_decay: AdamW's.
        scale_dtype: dtype in which scales are stored, and to which they are rounded in forward.
        compute_dtype: float32 or bfloat16; None is float32 on a CPU and bfloat16 on a GPU.
        device: where to train; None is the GPU if there is one.
        gradient_checkpointing: recompute each decoder layer in backward; None does where memory makes it necessary.
        seed: of the order of the windows.

    Raises:
        InputError: a value outside its range.
    """

    epochs: int = 1
    batch_size: int = 32
    micro_batch_size: int | None = None
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    scale_dtype: torch.dtype = torch.float16
    gradient_checkpointing: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, ("epochs", "batch_size"))
        check_integers(self, ("micro_batch_size",), none=True)
        check_numbers(self, ("weight_decay",))
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"warmup_ratio is {self.warmup_ratio!r}; allowed are 0 to 1")
        if not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm is {self.max_grad_norm!r}; allowed are numbers above 0, inf for none")
        if self.scale_dtype not in SCALE_DTYPES:
            raise InputError(f"scale_dtype is {self.scale_dtype}; allowed are float16, bfloat16 and float32")
        if self.compute_dtype not in (None, torch.float32, torch.bfloat16):
            raise InputError(
                f"compute_dtype is {self.compute_dtype}; allowed are float32 and bfloat16: float16 gradients underflow"
            )
