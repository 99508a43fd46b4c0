"""From the user's settings to each stage's."""

from __future__ import annotations

import torch

from formats.errors import InputError
from formats.types import QuantScheme

from ..block_ap.run import BlockApSettings
from ..e2e_qat import QatSettings
from ..e2e_qp.run import E2eSettings
from ..end_to_end.shares import check_batch
from ..hardware import DTYPES, resolve_device, resolve_dtype
from ..options import TrainConfig

__all__ = ["block_ap_settings", "compute_target", "e2e_settings", "qat_settings"]


def compute_target(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype to compute with.

    Raises:
        InputError: no such device here.
    """
    device = resolve_device(config.device)
    return device, resolve_dtype(config.dtype, device)


def block_ap_settings(config: TrainConfig) -> BlockApSettings:
    """Block-AP's settings, of a resolved configuration.

    Raises:
        InputError: values that contradict each other.
    """
    if config.bits is None or config.group is None or config.lr_weight is None or config.scale_dtype is None:
        raise ValueError("the configuration is not resolved")
    device, dtype = compute_target(config)
    return BlockApSettings(
        scheme=QuantScheme(config.bits, config.group),
        overrides=config.overrides or {},
        epochs=config.epochs,
        batch_size=config.batch,
        lr_weight=config.lr_weight,
        lr_scale=config.lr_scale,
        lr_zero=config.lr_zero,
        min_lr_factor=config.min_lr_factor,
        weight_decay=config.weight_decay,
        scale_dtype=DTYPES[config.scale_dtype],
        zero_range=_zero_range(config.zeros_in),
        compute_dtype=dtype,
        device=device,
        min_expert_tokens=config.min_expert_tokens,
        activations=config.activations,  # type: ignore[arg-type]  # one of its choices
        activation_dtype=None if config.activation_dtype == "auto" else DTYPES[config.activation_dtype],
        execution=config.execution,  # type: ignore[arg-type]  # one of its choices
        start=config.start,  # type: ignore[arg-type]  # one of its choices
        seed=config.seed,
    )


def _zero_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    ends = text.split(",")
    if len(ends) != 2 or not all(end.strip().isdecimal() for end in ends):
        raise InputError(f"--zeros-in is {text!r}; expected two integers, e.g. --zeros-in 1,2")
    return int(ends[0]), int(ends[1])


def qat_settings(config: TrainConfig) -> QatSettings:
    """E2E-QAT's settings, of a resolved configuration.

    Raises:
        InputError: values that contradict each other, or a batch that ranks cannot share.
    """
    if config.bits is None or config.group is None or config.lr_weight is None or config.scale_dtype is None:
        raise ValueError("the configuration is not resolved")
    check_batch(config.e2e_batch)
    device, dtype = compute_target(config)
    return QatSettings(
        scheme=QuantScheme(config.bits, config.group),
        overrides=config.overrides or {},
        start=config.start,  # type: ignore[arg-type]  # one of its choices
        zero_range=_zero_range(config.zeros_in),
        epochs=config.e2e_epochs,
        batch_size=config.e2e_batch,
        micro_batch_size=config.e2e_micro_batch,
        lr_weight=config.lr_weight,
        lr_scale=config.lr_scale,
        lr_zero=config.lr_zero,
        lr_norm=config.lr_norm,
        distill=config.distill,
        warmup_ratio=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        scale_dtype=DTYPES[config.scale_dtype],
        compute_dtype=dtype,
        device=device,
        seed=config.seed,
        share_weights=config.e2e_share,  # type: ignore[arg-type]  # one of its choices
    )


def e2e_settings(config: TrainConfig) -> E2eSettings:
    """E2E-QP's settings, of a resolved configuration.

    Raises:
        InputError: a value outside its range.
    """
    if config.scale_dtype is None:
        raise ValueError("the configuration is not resolved")
    check_batch(config.e2e_batch)
    device, dtype = compute_target(config)
    return E2eSettings(
        epochs=config.e2e_epochs,
        batch_size=config.e2e_batch,
        micro_batch_size=config.e2e_micro_batch,
        lr=config.lr_e2e,
        warmup_ratio=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        scale_dtype=DTYPES[config.scale_dtype],
        compute_dtype=dtype,
        device=device,
        seed=config.seed,
        share_weights=config.e2e_share,  # type: ignore[arg-type]  # one of its choices
    )
