"""Settings of E2E-QP, and the report of what a run did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from formats.errors import InputError
from formats.types import SCALE_DTYPES

__all__ = ["E2eReport", "E2eSettings"]


@dataclass(frozen=True)
class E2eSettings:
    """How E2E-QP trains; the defaults are the paper's.

    Attributes:
        epochs: passes over the data.
        batch_size: windows an optimizer step.
        micro_batch_size: windows a forward pass; None chooses by memory.
        lr: peak learning rate; None is the paper's, 2e-5 at 2 bits and 1e-5 above.
        warmup_ratio: share of the steps with a rising learning rate.
        max_grad_norm: global norm the scales' gradient is clipped to; infinity switches clipping off.
        weight_decay: AdamW's.
        scale_dtype: what the scales are stored in and rounded to in forward.
        compute_dtype: float32 or bfloat16, of activations, matmuls and everything not packed; None is float32 on a
            CPU and bfloat16 on a GPU.
        device: where to train; None is the GPU if there is one.
        gradient_checkpointing: recompute each decoder layer in backward; None recomputes what memory makes necessary.
        activation_budget: bytes that forward may keep for backward while ``gradient_checkpointing`` is None; None is
            1 GiB on a CPU and 60 % of what is free on a GPU.
        seed: of the order of the windows.
        share_weights: "on" keeps one rank's share of the packed weights on each rank and gathers a layer's for use,
            "auto" does so where they take over half of a GPU; see :mod:`eqat_train.e2e_qp.shared_words`.

    Raises:
        InputError: a value outside its range.
    """

    epochs: int = 1
    batch_size: int = 32
    micro_batch_size: int | None = None
    lr: float | None = None
    warmup_ratio: float = 0.03
    max_grad_norm: float = 0.3
    weight_decay: float = 0.0
    scale_dtype: torch.dtype = torch.float16
    compute_dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    gradient_checkpointing: bool | None = None
    activation_budget: int | None = None
    seed: int = 0
    share_weights: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_size", "activation_budget"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}; allowed are integers from 1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"lr is {self.lr!r}; allowed are finite numbers above 0")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"warmup_ratio is {self.warmup_ratio!r}; allowed are 0 to 1")
        if not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm is {self.max_grad_norm!r}; allowed are numbers above 0, inf for none")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay is {self.weight_decay!r}; allowed are finite numbers from 0")
        if self.scale_dtype not in SCALE_DTYPES:
            raise InputError(f"scale_dtype is {self.scale_dtype}; allowed are float16, bfloat16 and float32")
        if self.compute_dtype not in (None, torch.float32, torch.bfloat16):
            raise InputError(
                f"compute_dtype is {self.compute_dtype}; allowed are float32 and bfloat16: float16 gradients underflow"
            )

    def resolved_device(self) -> torch.device:
        """The device to train on."""
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def resolved_compute_dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        return torch.bfloat16 if self.resolved_device().type == "cuda" else torch.float32

    def resolved_lr(self, bits: int) -> float:
        """The peak learning rate for a model whose widest codes have ``bits`` bits."""
        if self.lr is not None:
            return self.lr
        return 2e-5 if bits <= 2 else 1e-5


@dataclass(frozen=True)
class E2eReport:
    """What a run did.

    Attributes:
        losses: training loss of each optimizer step, before the step.
        grad_norms: global gradient norm of each step, before clipping.
        val_loss_before: mean validation loss of the starting checkpoint, None without validation data.
        val_loss_after: of the result.
        lr: peak learning rate.
        scales: number of trained values.
        tokens: tokens read by training.
        seconds: wall time, loading and writing included.
        peak_memory: bytes; of the GPU's allocator, else of the process so far.
        memory: bytes on a GPU by what they hold: "packed_weights", "scales", "training" (gradients and AdamW's
            moments), "dense"; the rest of the peak are activations. Empty on a CPU.
    """

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    val_loss_before: float | None
    val_loss_after: float | None
    lr: float
    scales: int
    tokens: int
    seconds: float
    peak_memory: int
    memory: dict[str, int]

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.losses)
