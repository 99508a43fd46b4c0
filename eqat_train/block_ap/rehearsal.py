"""A few real steps on a model's largest block, timed; nothing is written.

Weights are the model's own and tokens are random: neither a step's time nor its memory depends on which.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats import QuantizedLinear
from formats.checkpoint import CheckpointReader

from ..e2e_qp.quant_linear import QuantLinear
from ..models.loading import build_skeleton, load_parameters_, unload_
from ..reporting.progress import Reporter
from .capture import BlockCall, Capture
from .passes import autocast
from .run import BlockApRun
from .settings import BlockApSettings
from .steps import block_steps
from .trainable_block import TrainableBlock

__all__ = ["Rehearsal", "rehearse"]

STEPS, WARMUP = 8, 4  # the first steps compile kernels, make the optimizer's state and capture a graph
ENOUGH_SECONDS = 20.0


@dataclass(frozen=True)
class Rehearsal:
    """What was measured.

    Attributes:
        block: index of the block.
        steps: of Block-AP that were timed; 0 where there are to be none.
        step_seconds: of one of them.
        pass_seconds: of a token's way through the block without training.
        e2e_seconds: of a token's way through the packed block in E2E-QP: forward, again if recomputed, and backward.
        device_bytes: the GPU's peak during Block-AP's steps; 0 on a CPU.
    """

    block: int
    steps: int
    step_seconds: float
    pass_seconds: float
    e2e_seconds: float
    device_bytes: int


def rehearse(
    model_folder: Path,
    settings: BlockApSettings,
    seq_len: int,
    e2e_shape: tuple[int, int] | None,
    reporter: Reporter,
    *,
    recomputed: bool = True,
    trust_remote_code: bool = False,
) -> Rehearsal:
    """Times the largest block of a full-precision model.

    Args:
        model_folder: the model.
        settings: Block-AP's; with 0 epochs its steps are left out.
        seq_len: tokens of Block-AP's windows.
        e2e_shape: windows and tokens of a pass of E2E-QP; None leaves it out.
        reporter: is told what is measured.
        recomputed: whether E2E-QP runs layers again in backward.
        trust_remote_code: allow Python files of the model folder to run.
    """
    device, dtype = settings.resolved_device(), settings.resolved_compute_dtype()
    with CheckpointReader(model_folder) as reader:
        model = build_skeleton(model_folder, torch.float32, trust_remote_code=trust_remote_code)
        run = BlockApRun(reader, model, settings, reporter)
        sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in run.layers]
        index = sizes.index(max(sizes))
        layer, path = run.layers[index], f"{run.path}.{index}"
        reporter.message(f"measuring a few steps of block {index + 1} of {len(run.layers)}")
        draw = torch.Generator().manual_seed(settings.seed)
        vocabulary = model.config.get_text_config().vocab_size

        def inputs(windows: int, length: int) -> tuple[BlockCall, Tensor]:
            ids = torch.randint(0, vocabulary, (windows, length), generator=draw)
            with Capture(model, run.path, run.layers, reader, device) as capture:
                return capture.calls(ids[:1])[index], capture.inputs(ids)

        call, hidden = inputs(settings.batch_size, seq_len)
        packed_call = inputs(*e2e_shape) if e2e_shape else None
        load_parameters_(layer, path, reader, device, torch.float32)
        with torch.no_grad(), autocast(device, dtype):
            target = call.run(layer, hidden)
            pass_seconds = _time(device, lambda: call.run(layer, hidden), 1, 3)[0] / (settings.batch_size * seq_len)
        schemes = {
            name.removeprefix(f"{path}."): scheme
            for name, scheme in run.schemes.items()
            if scheme is not None and name.startswith(f"{path}.")
        }
        stored = {name: reader.tensors[f"{path}.{name}"].dtype for name, _ in layer.named_parameters()}
        block = TrainableBlock(layer, schemes, settings.scale_dtype, stored, settings.zero_range)
        step_seconds, steps, peak = 0.0, 0, 0
        if settings.epochs and schemes:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            step = block_steps(block, call, settings, 4 * STEPS, hidden[0], reporter.message)
            step_seconds, steps = _time(device, lambda: step(hidden, target), WARMUP, STEPS)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            step.close()
            del step
        layers, _ = block.finish_()
        e2e_seconds = 0.0
        if packed_call is not None and layers:
            tokens = packed_call[1].shape[0] * packed_call[1].shape[1]
            e2e_seconds = _packed_seconds(layer, layers, *packed_call, settings, dtype, recomputed) / tokens
        unload_(layer)
    return Rehearsal(index, steps, step_seconds, pass_seconds, e2e_seconds, peak)


def _packed_seconds(
    layer: nn.Module,
    layers: dict[str, QuantizedLinear],
    call: BlockCall,
    hidden: Tensor,
    settings: BlockApSettings,
    dtype: torch.dtype,
    recomputed: bool,
) -> float:
    """Time of some windows' way through a packed block and back."""
    layer.to(dtype)
    for name, quantized in layers.items():
        layer.set_submodule(name, QuantLinear.from_layer(quantized, scale_dtype=settings.scale_dtype).to(hidden.device))
    call = BlockCall(
        tuple(_cast(value, dtype) for value in call.args),
        {name: _cast(value, dtype) for name, value in call.kwargs.items()},
        call.hidden_keyword,
    )
    hidden = hidden.to(dtype).requires_grad_()

    def forth_and_back() -> None:
        if recomputed:
            with torch.no_grad():
                call.run(layer, hidden)
        output = call.run(layer, hidden)
        output.backward(torch.ones_like(output))

    return _time(hidden.device, forth_and_back, 1, 3)[0]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value


def _time(device: torch.device, work: Callable[[], object], warmup: int, count: int) -> tuple[float, int]:
    """The shortest time of a call and how many were timed; fewer where they are long."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < warmup + count:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
        if time.perf_counter() - began > ENOUGH_SECONDS and (len(times) > warmup or device.type == "cpu"):
            break
    timed = times[warmup:] or times[-1:]
    return min(timed), len(timed)
