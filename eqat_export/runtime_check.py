"""A checkpoint in a real runtime, compared with our own dequantized forward pass.

Two proofs, on the same loaded model:

1. Weights. Every quantized layer of the runtime is fed unit vectors, so that its output is its weight matrix, column
   by column, with a single non-zero product in each sum: no rounding but that of the weights themselves. It has to
   equal ``fp16((q - z) * s)`` bit for bit. Layers of more than ``FULL_PROBE`` multiplications are probed with one
   input feature of every group, which still covers every scale and every zero-point.
2. Logits on fixed token ids. The yardstick is measured in the same run: how far our own forward pass in fp16 is from
   the one in fp32. A correct runtime does the same fp16 arithmetic in another order, so its error is another draw of
   the same kind: the root mean square over all logits may be ``RMS_FACTOR`` times ours, the largest one
   ``MAX_FACTOR`` times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eqat_export.quiet import library_output_hidden
from eqat_export.runtimes.base import Runtime
from eqat_export.runtimes.reference import reference_logits, token_ids
from formats.affine import dequantize
from formats.errors import CheckpointError
from formats.model import Checkpoint
from formats.types import QuantizedLinear

__all__ = ["RuntimeResult", "check_runtime"]

RMS_FACTOR = 1.5
MAX_FACTOR = 2.0
FULL_PROBE = 2**33
PROBE_ROWS = 4096
# What libraries raise over a folder that they do not take; anything else is a bug and stays one.
REFUSALS = (
    ValueError,
    RuntimeError,
    NotImplementedError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
)


@dataclass
class RuntimeResult:
    """What the runtime computed, against us.

    Attributes:
        refusal: what the runtime said instead of loading the checkpoint; empty when it loaded.
        wrong_layers: layer -> how many of its probed weights differ.
        weights: weights probed.
        error_max, error_rms: runtime's logits against our fp32 logits.
        fp16_max, fp16_rms: our fp16 logits against our fp32 logits.
        logit_std: spread of the fp32 logits, for scale.
    """

    runtime: str
    version: str
    device: str
    tokens: tuple[int, ...]
    layers: int
    refusal: str = ""
    weights: int = 0
    wrong_layers: dict[str, int] = field(default_factory=dict)
    error_max: float = 0.0
    error_rms: float = 0.0
    fp16_max: float = 0.0
    fp16_rms: float = 0.0
    logit_std: float = 0.0

    @property
    def weights_ok(self) -> bool:
        """Every probed weight is ours."""
        return not self.wrong_layers

    @property
    def logits_ok(self) -> bool:
        """Within what fp16 rounding does; false for NaN."""
        return self.error_max <= MAX_FACTOR * self.fp16_max and self.error_rms <= RMS_FACTOR * self.fp16_rms

    @property
    def ok(self) -> bool:
        """Both proofs hold."""
        return not self.refusal and self.weights_ok and self.logits_ok

    def lines(self) -> list[str]:
        """For a person."""
        title = f"{self.runtime} {self.version} on {self.device}, {self.tokens[0]} x {self.tokens[1]} tokens"
        if self.refusal:
            return [title, f"does not load it: {self.refusal}"]
        if not self.layers:
            weights = "no quantized layers; logits only"
        elif self.weights_ok:
            weights = (
                f"all {self.layers} layers compute with our weights ({self.weights:,} compared, bit for bit in fp16)"
            )
        else:
            worst = max(self.wrong_layers, key=lambda name: self.wrong_layers[name])
            weights = (
                f"weights of {len(self.wrong_layers)} of {self.layers} layers differ, most in {worst} "
                f"({self.wrong_layers[worst]:,} weights)"
            )
        return [
            title,
            weights,
            f"logits: rms error {self.error_rms:.3g} (allowed {RMS_FACTOR:g} x fp16's {self.fp16_rms:.3g}), largest "
            f"{self.error_max:.3g} (allowed {MAX_FACTOR:g} x {self.fp16_max:.3g}), logit std {self.logit_std:.3g}",
        ]

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {**vars(self), "tokens": list(self.tokens), "ok": self.ok}


def check_runtime(checkpoint: Checkpoint, runtime: Runtime, ids: Tensor | None = None) -> RuntimeResult:
    """Loads a checkpoint in a runtime and compares it with our own forward pass.

    Args:
        checkpoint: a checkpoint whose format the runtime reads.
        runtime: where to load it.
        ids: int64 token ids ``[batch, length]``; seeded ones without it.

    Raises:
        InputError: the runtime does not read this format.
        MissingExtraError: a package is missing.
        CheckpointError: the runtime's model lacks a layer.
    """
    runtime.check(checkpoint.format.id if checkpoint.format else None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = token_ids(_vocabulary(checkpoint)) if ids is None else ids
    result = RuntimeResult(runtime.id, runtime.version, str(device), tuple(ids.shape), len(checkpoint.layer_names))
    with library_output_hidden():
        exact = reference_logits(checkpoint, ids, torch.float32, device)
        half = reference_logits(checkpoint, ids, torch.float16, device)
        bits = checkpoint.scheme.bits if checkpoint.scheme else None
        try:
            model = runtime.load(checkpoint.reader.folder, bits, device)
            theirs = runtime.logits(model, ids.to(device))
        except REFUSALS as error:
            result.refusal = f"{type(error).__name__}: {error}"
            return result
        _compare_weights(checkpoint, runtime, model, device, result)
    result.logit_std = float(exact.std())
    result.error_max, result.error_rms = _spread(theirs, exact)
    result.fp16_max, result.fp16_rms = _spread(half, exact)
    return result


def _compare_weights(
    checkpoint: Checkpoint, runtime: Runtime, model: nn.Module, device: torch.device, result: RuntimeResult
) -> None:
    modules = dict(model.named_modules())
    for name in checkpoint.layer_names:
        if name not in modules:
            raise CheckpointError(
                f"{runtime.id} has no module {name}; config.json and the layers contradict each other"
            )
        probed, wrong = _probe(runtime, modules[name], checkpoint.layer(name), device)
        result.weights += probed
        if wrong:
            result.wrong_layers[name] = wrong


def _probe(runtime: Runtime, module: nn.Module, layer: QuantizedLinear, device: torch.device) -> tuple[int, int]:
    """Weights compared, and how many of them differ."""
    columns = probe_columns(layer)
    weight = dequantize(layer).half()  # [out, in]
    wrong = 0
    for chunk in columns.split(PROBE_ROWS):
        inputs = torch.zeros(len(chunk), layer.in_features, dtype=torch.float16)
        inputs[torch.arange(len(chunk)), chunk] = 1
        expected = weight[:, chunk].T  # [rows, out]
        if layer.bias is not None:
            expected = (expected.float() + layer.bias.half().float()).half()
        wrong += int((runtime.layer_rows(module, inputs.to(device)) != expected).sum())
    return len(columns) * layer.out_features, wrong


def probe_columns(layer: QuantizedLinear) -> Tensor:
    """Input features to probe: all of them, or the first of every group in a large layer."""
    if layer.in_features**2 * layer.out_features <= FULL_PROBE:
        return torch.arange(layer.in_features)
    index = layer.group_index()
    first = torch.full((layer.groups,), layer.in_features)
    first.scatter_reduce_(0, index, torch.arange(layer.in_features), "amin")
    return first[first < layer.in_features]


def _spread(logits: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference."""
    difference = (logits - exact).double()
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def _vocabulary(checkpoint: Checkpoint) -> int:
    """Ids that certainly exist: the rows of the embedding as the configuration states them."""
    config = checkpoint.reader.config
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError(f"{checkpoint.reader.folder / 'config.json'} has no vocab_size")
    return size
