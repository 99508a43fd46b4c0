"""Settings of Block-AP, and the report of what a run did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from formats import QuantScheme
from formats.errors import InputError

from ..starts import STARTS, Start
from ..training_settings import ComputeSettings, check_integers, check_numbers, check_scheme, check_zero_range
from .activations import Place

__all__ = ["BlockApReport", "BlockApSettings", "BlockReport"]

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BlockApSettings(ComputeSettings):
    """Settings of Block-AP; the defaults are the paper's for 2 bits.

    Attributes:
        scheme: bits and group_size; sym and desc_act must be off.
        overrides: pattern over module paths -> what differs there, see :mod:`eqat_train.overrides`.
        epochs: passes over the samples for each block; 0 is round-to-nearest, without any data.
        batch_size: samples a step.
        lr_weight: learning rate of weights, norms and biases; 0 freezes them.
        lr_scale: learning rate of scales; 0 freezes them.
        lr_zero: learning rate of zero-points; 0 freezes them.
        min_lr_factor: the cosine schedule ends at the learning rate divided by this.
        weight_decay: AdamW's.
        scale_dtype: dtype in which scales are stored.
        compute_dtype: float32, bfloat16 or float16; None is float32 on a CPU and bfloat16 on a GPU.
        device: where to train; None is the GPU if there is one.
        zero_range: lowest and highest zero-point to use; None for 0 to maxq.
        min_expert_tokens: training tokens that an expert of a mixture has to see; with fewer it is rounded to the
            nearest and not trained.
        activations: where hidden states are kept; "auto" is the fastest place with room.
        activation_dtype: what hidden states are kept in; None is float32.
        execution: how a step runs on a GPU: "eager" launches its kernels one by one, "graph" replays them as one CUDA
            graph, "compile" also fuses elementwise work by torch.compile. "auto" is "graph" where that is possible.
        start: of scales and zero-points, see :mod:`eqat_train.starts`; the paper's is "minmax".
        seed: of torch's generators, for blocks that draw random numbers; the order of samples is fixed.
    """

    scheme: QuantScheme
    overrides: Mapping[str, str] = field(default_factory=dict)
    epochs: int = 2
    batch_size: int = 2
    lr_weight: float = 2e-5
    lr_scale: float = 1e-4
    lr_zero: float = 1e-4
    min_lr_factor: float = 20.0
    weight_decay: float = 0.0
    scale_dtype: torch.dtype = torch.float16
    zero_range: tuple[int, int] | None = None
    min_expert_tokens: int = 256
    activations: Place | Literal["auto"] = "auto"
    activation_dtype: torch.dtype | None = None
    execution: Literal["auto", "eager", "graph", "compile"] = "auto"
    start: Start = "minmax"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, ("batch_size",))
        check_integers(self, ("epochs", "min_expert_tokens"), least=0)
        check_numbers(self, ("lr_weight", "lr_scale", "lr_zero", "weight_decay"))
        if self.epochs and not (self.lr_weight or self.lr_scale or self.lr_zero):
            raise InputError("every learning rate is 0, so nothing would be trained; use epochs 0 for round-to-nearest")
        if not self.min_lr_factor >= 1:
            raise InputError(f"min_lr_factor is {self.min_lr_factor!r}; allowed are numbers from 1")
        if self.compute_dtype is not None and self.compute_dtype not in COMPUTE_DTYPES:
            raise InputError(f"compute_dtype is {self.compute_dtype}; allowed are float32, bfloat16 and float16")
        if self.execution in ("graph", "compile") and not self.fuses_steps():
            raise InputError(
                f"execution {self.execution} needs a CUDA device and float32 or bfloat16, and this is "
                f"{self.resolved_device()} and {self.resolved_compute_dtype()}; use auto or eager"
            )
        check_zero_range(self.zero_range, self.scheme, self.overrides)
        if self.start not in ("minmax", "mse"):
            raise InputError(f"start is {self.start!r}; Block-AP's are minmax and mse, E2E-QAT's {', '.join(STARTS)}")
        check_scheme(self.scheme, "Block-AP")

    def resolved_activation_dtype(self) -> torch.dtype:
        """The dtype to keep hidden states in."""
        return torch.float32 if self.activation_dtype is None else self.activation_dtype

    def fuses_steps(self) -> bool:
        """Whether AdamW and the quantizer are one pass over each weight: on a GPU, unless gradients must be scaled."""
        return self.resolved_device().type == "cuda" and self.resolved_compute_dtype() != torch.float16


@dataclass(frozen=True)
class BlockReport:
    """One block's training.

    Attributes:
        index: position of the block.
        start_val_loss: validation loss before training, that of round-to-nearest; None without validation samples.
        train_losses: mean training loss of every epoch.
        val_losses: validation loss of every epoch.
        seconds: wall time, reading and writing included.
        peak_memory: most bytes in use: of the GPU's allocator in this block, else of the process so far.
    """

    index: int
    start_val_loss: float | None
    train_losses: tuple[float, ...]
    val_losses: tuple[float | None, ...]
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class BlockApReport:
    """What a run did.

    Attributes:
        blocks: one report a block.
        seconds: wall time of the whole run.
        peak_memory: largest of the blocks'.
        zero_range: lowest and highest zero-point to use; None for 0 to maxq.
        activations: where hidden states were kept; None when none were needed.
    """

    blocks: tuple[BlockReport, ...]
    seconds: float
    peak_memory: int
    activations: Place | None
