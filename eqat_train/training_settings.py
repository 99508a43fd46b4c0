"""What every training stage's settings have: where and in what to compute, and checks of values that stages share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from formats import QuantScheme
from formats.errors import InputError, UnsupportedSchemeError

from .overrides import override_scheme

__all__ = ["ComputeSettings", "check_integers", "check_numbers", "check_scheme", "check_zero_range"]


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Where and in what a stage computes.

    Attributes:
        compute_dtype: of activations and matmuls; None is float32 on a CPU and bfloat16 on a GPU.
        device: where to train; None is the GPU if there is one.
    """

    compute_dtype: torch.dtype | None = None
    device: torch.device | str | None = None

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


def check_integers(settings: object, names: Iterable[str], *, least: int = 1, none: bool = False) -> None:
    """Refuses attributes that are no integer from ``least``, nor None where that is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is None and none:
            continue
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}; allowed are integers from {least}")


def check_numbers(settings: object, names: Iterable[str]) -> None:
    """Refuses attributes that are no finite number from 0."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value < math.inf:
            raise InputError(f"{name} is {value!r}; allowed are finite numbers from 0")


def check_scheme(scheme: QuantScheme, stage: str) -> None:
    """Refuses schemes whose weights are not trained.

    Raises:
        UnsupportedSchemeError: symmetric, or with columns in another order.
    """
    if scheme.sym or scheme.desc_act:
        raise UnsupportedSchemeError(
            f"{stage} trains zero-points and keeps the order of columns; {scheme} cannot be trained, "
            f"use w{scheme.bits}g{scheme.group_size}"
        )


def check_zero_range(zero_range: tuple[int, int] | None, scheme: QuantScheme, overrides: Mapping[str, str]) -> None:
    """Refuses ends that some layer's zero-points cannot have.

    Args:
        zero_range: lowest and highest zero-point to use; None for all.
        scheme: model-wide.
        overrides: pattern -> what differs there.
    """
    if zero_range is None:
        return
    low, high = zero_range
    found = (override_scheme(value, scheme) for value in overrides.values())
    narrowest = min((scheme, *filter(None, found)), key=lambda scheme: scheme.bits)
    if not 0 <= low <= high <= narrowest.maxq:
        raise InputError(
            f"zeros-in is {low},{high}; at {narrowest.bits} bits both lie in 0..{narrowest.maxq}, the lower one first"
        )
