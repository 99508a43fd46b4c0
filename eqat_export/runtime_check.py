"""A checkpoint in a real runtime, compared with our own arithmetic.

Two proofs, on the same loaded checkpoint:

1. Weights. Every quantized layer of the runtime is fed unit vectors, so that its output is its weight matrix, column
   by column, with a single non-zero product in each sum: no rounding but that of the weights themselves. It has to
   equal ``(q - z) * s`` rounded to the dtype in which the runtime computes, bit for bit. Layers of more than
   ``FULL_PROBE`` multiplications are probed with one input feature of every group, which still covers every scale and
   every zero-point.
2. Arithmetic. Logits on fixed token ids; the yardstick is measured in the same run: how far our own forward pass in
   the runtime's dtype is from a finer one. A correct runtime does the same arithmetic in another order, so its error
   is another draw of the same kind: the root mean square over all logits may be ``RMS_FACTOR`` times ours, the largest
   one ``MAX_FACTOR`` times. A runtime of single layers has no logits; there, outputs for random inputs are compared
   with float64, and may be ``OUTPUT_FACTOR`` times as far off as exact outputs rounded to the dtype: kernels that split
the sum over k round each part to it (humming 0.1.19 on 1408 features: 2.6 times), and one that kept whole sums in
fp16 would be far beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eqat_export.quiet import library_output_hidden
from eqat_export.runtimes.base import Runtime, Session
from eqat_export.runtimes.reference import reference_logits, token_ids
from eqat_export.tensors import dtype_name
from formats.errors import CheckpointError
from formats.model import Checkpoint
from formats.types import QuantizedLinear

__all__ = ["RuntimeResult", "check_runtime"]

RMS_FACTOR = 1.5
MAX_FACTOR = 2.0
OUTPUT_FACTOR = 4.0
RANDOM_ROWS = (1, 16)
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
        dtype: in which the runtime computes.
        refusal: what the runtime said instead of loading the checkpoint; empty when it loaded.
        wrong_layers: layer -> how many of its probed weights differ.
        weights: weights probed.
        tokens: batch and length of the logits compared; empty where the runtime runs single layers.
        error_max, error_rms: runtime's logits against exact ones.
        own_max, own_rms: the yardstick's logits against exact ones.
        yardstick: whose logits those are.
        logit_std: spread of the exact logits, for scale.
        output_error: largest relative error of a layer's outputs for random inputs, where there are no logits.
        output_ratio: the same, divided by what rounding exact outputs to ``dtype`` costs.
    """

    runtime: str
    version: str
    device: str
    layers: int
    dtype: str = ""
    refusal: str = ""
    weights: int = 0
    wrong_layers: dict[str, int] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    error_max: float = 0.0
    error_rms: float = 0.0
    own_max: float = 0.0
    own_rms: float = 0.0
    yardstick: str = ""
    logit_std: float = 0.0
    output_error: float = 0.0
    output_ratio: float = 0.0
    output_layer: str = ""

    @property
    def weights_ok(self) -> bool:
        """Every probed weight is ours."""
        return not self.wrong_layers

    @property
    def logits_ok(self) -> bool:
        """Within what the dtype's rounding does; false for NaN."""
        if not self.tokens:
            return self.output_ratio <= OUTPUT_FACTOR
        return self.error_max <= MAX_FACTOR * self.own_max and self.error_rms <= RMS_FACTOR * self.own_rms

    @property
    def ok(self) -> bool:
        """Both proofs hold."""
        return not self.refusal and self.weights_ok and self.logits_ok

    def lines(self) -> list[str]:
        """For a person."""
        title = f"{self.runtime} {self.version} on {self.device}"
        if self.refusal:
            return [title, f"does not load it: {self.refusal}"]
        if not self.layers:
            weights = "no quantized layers; logits only"
        elif self.weights_ok:
            weights = (
                f"all {self.layers} layers compute with our weights "
                f"({self.weights:,} compared, bit for bit in {self.dtype})"
            )
        else:
            worst = max(self.wrong_layers, key=lambda name: self.wrong_layers[name])
            weights = (
                f"weights of {len(self.wrong_layers)} of {self.layers} layers differ, most in {worst} "
                f"({self.wrong_layers[worst]:,} weights)"
            )
        return [title, weights, self._arithmetic()]

    def _arithmetic(self) -> str:
        if not self.tokens:
            return (
                f"outputs for random inputs: largest relative error {self.output_error:.3g} in {self.output_layer}, "
                f"{self.output_ratio:.3g} x what rounding them to {self.dtype} costs (allowed {OUTPUT_FACTOR:g})"
            )
        return (
            f"logits on {self.tokens[0]} x {self.tokens[1]} tokens: rms error {self.error_rms:.3g} (allowed "
            f"{RMS_FACTOR:g} x {self.yardstick}, {self.own_rms:.3g}), largest {self.error_max:.3g} "
            f"(allowed {MAX_FACTOR:g} x {self.own_max:.3g}), logit std {self.logit_std:.3g}"
        )

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {**vars(self), "tokens": list(self.tokens), "ok": self.ok}


def check_runtime(checkpoint: Checkpoint, runtime: Runtime, ids: Tensor | None = None) -> RuntimeResult:
    """Loads a checkpoint in a runtime and compares it with our own arithmetic.

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
    result = RuntimeResult(runtime.id, runtime.version, str(device), len(checkpoint.layer_names))
    with library_output_hidden():
        ids = token_ids(vocabulary(checkpoint)) if ids is None else ids
        try:
            session = runtime.load(checkpoint, device)
            result.dtype = dtype_name(session.dtype)
            result.device = session.device or result.device
            theirs = session.logits(ids.to(device))
        except REFUSALS as error:
            result.refusal = f"{type(error).__name__}: {error}"
            return result
        for name in checkpoint.layer_names:
            if ".experts." in name and session.layer(name) is None:
                result.refusal = f"keeps the experts beside {name} in one parameter and has no quantized layer for them"
                return result
            _compare_layer(checkpoint, session, name, theirs is None, device, result)
        if theirs is not None:
            _compare_logits(checkpoint, session, ids, theirs, device, result)
    return result


def _compare_logits(
    checkpoint: Checkpoint, session: Session, ids: Tensor, theirs: Tensor, device: torch.device, result: RuntimeResult
) -> None:
    dtype = session.logits_dtype or session.dtype
    finer = torch.float64 if dtype == torch.float32 else torch.float32
    exact = reference_logits(checkpoint, ids, finer, device)
    coarse = session.yardstick(ids.to(device))
    if coarse is None:
        coarse = reference_logits(checkpoint, ids, dtype, device)
        result.yardstick = f"our own in {dtype_name(dtype)}"
    else:
        result.yardstick = session.yardstick_name
    result.tokens = tuple(ids.shape)
    result.logit_std = float(exact.std())
    result.error_max, result.error_rms = _spread(theirs, exact)
    result.own_max, result.own_rms = _spread(coarse, exact)


def _compare_layer(
    checkpoint: Checkpoint, session: Session, name: str, alone: bool, device: torch.device, result: RuntimeResult
) -> None:
    """Probes one layer's weights and, when no logits will tell about its arithmetic, its outputs for random inputs."""
    run = session.layer(name)
    if run is None:
        raise CheckpointError(
            f"{result.runtime} has no module {name}; config.json and the layers contradict each other"
        )
    layer = checkpoint.layer(name)
    weight = checkpoint.stored_weight(name, layer).to(session.dtype)  # [out, in]
    columns = probe_columns(layer)
    wrong = 0
    for chunk in columns.split(PROBE_ROWS):
        inputs = torch.zeros(len(chunk), layer.in_features, dtype=session.dtype)
        inputs[torch.arange(len(chunk)), chunk] = 1
        expected = weight[:, chunk].T  # [rows, out]
        if layer.bias is not None:
            expected = (expected.float() + layer.bias.to(session.dtype).float()).to(session.dtype)
        wrong += int((run(inputs.to(device)).cpu() != expected).sum())
    result.weights += len(columns) * layer.out_features
    if wrong:
        result.wrong_layers[name] = wrong
    if alone:
        generator = torch.Generator().manual_seed(0)
        for rows in RANDOM_ROWS:
            inputs = torch.randn(rows, layer.in_features, generator=generator).to(session.dtype)
            exact = inputs.double() @ weight.double().T
            if layer.bias is not None:
                exact += layer.bias.to(session.dtype).double()
            error = _relative(run(inputs.to(device)).cpu(), exact)
            limit = _relative(exact.to(session.dtype), exact)  # what storing the outputs costs by itself
            if error / limit > result.output_ratio:
                result.output_ratio, result.output_error, result.output_layer = error / limit, error, name


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


def _relative(found: Tensor, exact: Tensor) -> float:
    """``||found - exact|| / ||exact||``, L2."""
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))


def vocabulary(checkpoint: Checkpoint) -> int:
    """Ids that certainly exist: the rows of the embedding as the configuration states them."""
    config = checkpoint.reader.config
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError(f"{checkpoint.reader.folder / 'config.json'} has no vocab_size")
    return size
