"""Settings of E2E-QAT, and the report of what a run did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from formats import QuantScheme
from formats.errors import InputError

from ..end_to_end.settings import EndToEndSettings
from ..starts import STARTS, Start
from ..training_settings import check_numbers, check_scheme, check_zero_range

__all__ = ["QatReport", "QatSettings"]


@dataclass(frozen=True)
class QatSettings(EndToEndSettings):
    """How E2E-QAT trains; the defaults are those of ``--recipe best``.

    Attributes:
        scheme: bits and group_size; sym and desc_act must be off.
        overrides: pattern over module paths -> what differs there, see :mod:`eqat_train.overrides`.
        start: of scales and zero-points, see :mod:`eqat_train.starts`.
        zero_range: lowest and highest zero-point to use; None for 0 to maxq.
        lr_weight: peak learning rate of the quantized layers' weights; 0 freezes them.
        lr_scale: of scales; 0 freezes them.
        lr_zero: of zero-points; 0 freezes them.
        lr_norm: of norms and biases; 0 freezes them.
        distill: share of the loss that is the divergence from the full-precision model's predictions, 0 to 1; the
            rest is next-token cross-entropy.
        share_weights: "on" keeps one rank's share of the full-precision model's weights on each rank and gathers a
            layer's for use, as ranks always do with the trained ones; "auto" does so where a GPU has no room for them.

    The others are those of :class:`~eqat_train.end_to_end.settings.EndToEndSettings`.

    Raises:
        InputError: a value outside its range.
        UnsupportedSchemeError: a scheme that is not trained.
    """

    scheme: QuantScheme
    _: KW_ONLY
    overrides: Mapping[str, str] = field(default_factory=dict)
    start: Start = "activations"
    zero_range: tuple[int, int] | None = None
    batch_size: int = 16
    lr_weight: float = 1e-3
    lr_scale: float = 1e-4
    lr_zero: float = 1e-2
    lr_norm: float = 1e-3
    distill: float = 1.0
    share_weights: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = ("lr_weight", "lr_scale", "lr_zero", "lr_norm")
        check_numbers(self, rates)
        if not any(getattr(self, name) for name in rates):
            raise InputError("every learning rate is 0, so nothing would be trained")
        if not 0 <= self.distill <= 1:
            raise InputError(f"distill is {self.distill!r}; allowed are 0 to 1")
        if self.start not in STARTS:
            raise InputError(f"start is {self.start!r}; allowed are {', '.join(STARTS)}")
        check_scheme(self.scheme, "E2E-QAT")
        check_zero_range(self.zero_range, self.scheme, self.overrides)


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
