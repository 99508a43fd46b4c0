"""Settings of E2E-QAT, and the report of what a run did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from formats import QuantScheme
from formats.errors import InputError, UnsupportedSchemeError

from ..starts import STARTS, Start

__all__ = ["QatReport", "QatSettings"]


@dataclass(frozen=True)
class QatSettings:
    """How E2E-QAT trains; the defaults are those of ``--recipe best``.

    Attributes:
        scheme: bits and group_size; sym and desc_act must be off.
        overrides: pattern over module paths -> what differs there, see :mod:`eqat_train.overrides`.
        start: of scales and zero-points, see :mod:`eqat_train.starts`.
        zero_range: lowest and highest zero-point to use; None for 0 to maxq.
        epochs: passes over the data.
        batch_size: windows an optimizer step.
        micro_batch_size: windows a forward pass; None chooses by memory.
        lr_weight: peak learning rate of the quantized layers' weights; 0 freezes them.
        lr_scale: of scales; 0 freezes them.
        lr_zero: of zero-points; 0 freezes them.
        lr_norm: of norms and biases; 0 freezes them.
        distill: share of the loss that is the divergence from the full-precision model's predictions, 0 to 1; the
            rest is next-token cross-entropy.
        warmup_ratio: share of the steps with a rising learning rate.
        max_grad_norm: global norm that the gradient is clipped to; infinity switches clipping off.
        weight_decay: AdamW's.
        scale_dtype: dtype in which scales are stored.
        compute_dtype: float32 or bfloat16; None is float32 on a CPU and bfloat16 on a GPU.
        device: where to train; None is the GPU if there is one.
        gradient_checkpointing: recompute each decoder layer in backward; None does where memory makes it necessary.
        seed: of the order of the windows.

    Raises:
        InputError: a value outside its range.
        UnsupportedSchemeError: a scheme that is not trained.
    """

    scheme: QuantScheme
    overrides: Mapping[str, str] = field(default_factory=dict)
    start: Start = "activations"
    zero_range: tuple[int, int] | None = None
    epochs: int = 1
    batch_size: int = 16
    micro_batch_size: int | None = None
    lr_weight: float = 1e-3
    lr_scale: float = 1e-4
    lr_zero: float = 1e-2
    lr_norm: float = 1e-3
    distill: float = 1.0
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    scale_dtype: torch.dtype = torch.float16
    compute_dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    gradient_checkpointing: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}; allowed are integers from 1")
        for name in ("lr_weight", "lr_scale", "lr_zero", "lr_norm", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value!r}; allowed are finite numbers from 0")
        if not any((self.lr_weight, self.lr_scale, self.lr_zero, self.lr_norm)):
            raise InputError("every learning rate is 0, so nothing would be trained")
        for name in ("distill", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed are 0 to 1")
        if not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm is {self.max_grad_norm!r}; allowed are numbers above 0, inf for none")
        if self.start not in STARTS:
            raise InputError(f"start is {self.start!r}; allowed are {', '.join(STARTS)}")
        if self.compute_dtype not in (None, torch.float32, torch.bfloat16):
            raise InputError(
                f"compute_dtype is {self.compute_dtype}; allowed are float32 and bfloat16: float16 gradients underflow"
            )
        if self.scheme.sym or self.scheme.desc_act:
            raise UnsupportedSchemeError(
                f"E2E-QAT trains zero-points and keeps the order of columns; {self.scheme} cannot be trained, "
                f"use w{self.scheme.bits}g{self.scheme.group_size}"
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


@dataclass(frozen=True)
class QatReport:
    """What a run did.

    Attributes:
        losses: training loss of each optimizer step, before the step.
        grad_norms: global gradient norm of each step, before clipping.
        val_loss_before: mean next-token loss of the start on the validation windows; None without any.
        val_loss_after: of the result.
        weights: weights in quantized layers.
        codes_changed: share of the codes that differ from the start's.
        tokens: tokens read by training.
        seconds: wall time, loading and writing included.
        peak_memory: bytes; of the GPU's allocator, else of the process so far.
    """

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    val_loss_before: float | None
    val_loss_after: float | None
    weights: int
    codes_changed: float
    tokens: int
    seconds: float
    peak_memory: int
