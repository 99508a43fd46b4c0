"""What a run made, measured: perplexity, size on disk, bits per weight, a sample text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from formats.model import Checkpoint, open_checkpoint

from ..data import TokenWindows
from ..evaluation.perplexity import generate_sample, perplexity
from ..evaluation.streamed import dense_bytes, streamed_perplexity
from ..models.loading import load_dense_model
from ..reporting.progress import Reporter

__all__ = ["Measurement", "ModelResult"]


@dataclass(frozen=True)
class ModelResult:
    """One row of the closing table.

    Attributes:
        model: what it is, e.g. ``Block-AP``.
        perplexity: on the evaluation windows; None without any.
        bytes: of all its weight files.
        bits_per_weight: stored bits a weight of the quantized layers, scales and zero-points included; of the whole
            model in full precision.
        sample: continuation of the prompt; None when none was asked for.
    """

    model: str
    perplexity: float | None
    bytes: int
    bits_per_weight: float
    sample: str | None


@dataclass(frozen=True)
class Measurement:
    """How models are measured, the same way for each.

    Attributes:
        windows: evaluation windows; None to leave perplexity out.
        tokenizer: of the model.
        prompt: what samples continue; None to leave them out.
        sample_tokens: their length; 0 leaves them out.
        seed: of the samples.
        device: where to run.
        dtype: what to compute in.
        trust_remote_code: allow Python files of model folders to run.
        whole: bytes that a whole model may take; a larger one is measured block by block, without a sample.
        work: folder for its hidden states on disk.
        activations: where they are kept.
    """

    windows: TokenWindows | None
    tokenizer: PreTrainedTokenizerBase
    prompt: str | None
    sample_tokens: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool
    whole: int
    work: Path
    activations: str

    @property
    def wanted(self) -> bool:
        """False when there is nothing to measure with."""
        return self.windows is not None or self._samples

    @property
    def _samples(self) -> bool:
        return self.prompt is not None and self.sample_tokens > 0

    def measure(self, title: str, folder: Path, reporter: Reporter) -> ModelResult:
        """Measures a model or checkpoint folder in any known format."""
        started = time.perf_counter()
        with open_checkpoint(folder) as checkpoint:
            size = sum(info.nbytes for info in checkpoint.reader.tensors.values())
            bits = bits_per_weight(checkpoint)
            needed = dense_bytes(checkpoint, self.dtype, trust_remote_code=self.trust_remote_code)
            value, sample = self._whole(checkpoint, title, reporter) if needed <= self.whole else (None, None)
            if needed > self.whole:
                reporter.message(
                    f"{title} takes {needed / 2**30:.1f} GiB as a whole: measured by block, without a sample"
                )
                value = self._by_block(checkpoint, title, reporter)
        result = ModelResult(title, value, size, bits, sample)
        reporter.event(
            "evaluation",
            model=title,
            perplexity=value,
            tokens=0 if self.windows is None else self.windows.loss_tokens,
            bytes=size,
            bits_per_weight=bits,
            seconds=time.perf_counter() - started,
        )
        return result

    def _whole(self, checkpoint: Checkpoint, title: str, reporter: Reporter) -> tuple[float | None, str | None]:
        model = load_dense_model(checkpoint, self.dtype, self.device, trust_remote_code=self.trust_remote_code)
        value, sample = None, None
        if self.windows is not None:
            value = perplexity(model, self.windows, reporter, title=f"evaluating {title}")
        if self._samples and self.prompt is not None:
            sample = generate_sample(model, self.tokenizer, self.prompt, self.sample_tokens, self.seed)
        return value, sample

    def _by_block(self, checkpoint: Checkpoint, title: str, reporter: Reporter) -> float | None:
        if self.windows is None:
            return None
        return streamed_perplexity(
            checkpoint,
            self.windows,
            self.dtype,
            self.device,
            reporter,
            work=self.work,
            activations=self.activations,
            title=f"evaluating {title}",
            trust_remote_code=self.trust_remote_code,
        )


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Stored bits a weight: of the quantized layers without biases, or of every tensor in full precision."""
    tensors = checkpoint.reader.tensors
    if checkpoint.format is None:
        elements = sum(math.prod(info.shape) for info in tensors.values())
        return 8 * sum(info.nbytes for info in tensors.values()) / elements
    weights = stored = 0
    for name in checkpoint.layer_names:
        rows, columns = checkpoint.layer_features(name)
        weights += rows * columns
        locals_ = checkpoint.layer_shapes(name).keys() - {"bias"}
        stored += sum(tensors[f"{name}.{local}"].nbytes for local in locals_)
    return 8 * stored / weights
