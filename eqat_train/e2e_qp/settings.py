"""Settings of E2E-QP, and the report of what a run did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from formats.errors import InputError

from ..end_to_end.settings import EndToEndSettings
from ..training_settings import check_integers

__all__ = ["E2eReport", "E2eSettings"]


@dataclass(frozen=True, kw_only=True)
class E2eSettings(EndToEndSettings):
    """How E2E-QP trains; the defaults are the paper's.

    Attributes:
        lr: peak learning rate; None is the paper's, 2e-5 at 2 bits and 1e-5 above.
        activation_budget: bytes that forward may keep for backward while ``gradient_checkpointing`` is None; None is
            1 GiB on a CPU and 60 % of what is free on a GPU.
        share_weights: "on" keeps one rank's share of the packed weights on each rank and gathers a layer's for use,
            "auto" does so where they take over half of a GPU; see :mod:`eqat_train.e2e_qp.shared_words`.

    The others are those of :class:`~eqat_train.end_to_end.settings.EndToEndSettings`.

    Raises:
        InputError: a value outside its range.
    """

    lr: float | None = None
    max_grad_norm: float = 0.3
    activation_budget: int | None = None
    share_weights: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, ("activation_budget",), none=True)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"lr is {self.lr!r}; allowed are finite numbers above 0")

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
