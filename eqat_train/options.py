"""Every setting of ``eqat train``: one name for the YAML file, the command line and the code.

The command line is built from the fields of :class:`TrainConfig`; ``seq_len`` is ``--seq-len`` there, and the lines
of ``overrides`` are ``--override`` each. None means
"chosen when the run starts", as the help text says. Defaults are the paper's (arXiv 2407.11062).

This module imports nothing heavy: the root command reads it to print its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PANELS", "TrainConfig"]

PANELS = ("Quantization", "Data", "Block-AP", "End to end", "Output", "Hardware")


def _option(
    default: Any,
    panel: str,
    help_text: str,
    *,
    metavar: str | None = None,
    choices: tuple[Any, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
) -> Any:
    """A field with its help text, and the values it may take: one of ``choices``, ``>= least`` or ``> above``."""
    metadata = {
        "panel": panel,
        "help": help_text,
        "metavar": "|".join(map(str, choices)) if choices else metavar,
        "choices": choices,
        "least": least,
        "above": above,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the help text of each field says what it is."""

    model: str | None = _option(
        None, "Data", "Local folder or hub id; without it, the demo model and text of the package.", metavar="MODEL"
    )
    bits: int | None = _option(
        None, "Quantization", "Bits per weight. Default 2; E2E-QP alone keeps the checkpoint's.", choices=(2, 3, 4, 8)
    )
    group: int | None = _option(
        None,
        "Quantization",
        "Input features that share a scale and a zero-point; -1 for a whole row. Default 64.",
        metavar="N",
    )
    stage: str = _option(
        "all",
        "Quantization",
        "What to run: Block-AP and E2E-QP (all), one of them, or E2E-QAT, which trains the whole model at once.",
        choices=("all", "block-ap", "e2e-qp", "e2e-qat"),
    )
    start: str = _option(
        "minmax",
        "Quantization",
        "Scales and zero-points to start from: the groups' ends, the least squared error of the weights (mse), or the "
        "same weighted by the inputs (activations; E2E-QAT only).",
        choices=("minmax", "mse", "activations"),
    )
    scale_dtype: str | None = _option(
        None,
        "Quantization",
        "What scales are stored in. Default float16; E2E-QP alone keeps the checkpoint's.",
        choices=("float16", "bfloat16", "float32"),
    )
    overrides: Mapping[str, str] | None = _option(
        None,
        "Quantization",
        "Layers of other bits or groups, or left alone: '*.down_proj=w4g128', 'model.layers.0.*=skip'. Repeatable; of "
        "several that match, the last holds.",
        metavar="PATTERN=VALUE",
    )
    zeros_in: str | None = _option(
        None,
        "Quantization",
        "Keep zero-points between these two: 1,2 at 2 bits makes every layer fit GGUF's Q2_0. Default all.",
        metavar="LOW,HIGH",
    )

    data: str | None = _option(
        None,
        "Data",
        "Training text: .txt, .txt.xz, .jsonl or .parquet file, or a datasets id name[:config[:split]].",
        metavar="FILE|DATASET",
    )
    e2e_data: str | None = _option(
        None, "Data", "Text or instructions for E2E-QP; without it, --data.", metavar="FILE|DATASET"
    )
    eval_data: str | None = _option(
        None, "Data", "Held-out text for the closing table of perplexities.", metavar="FILE|DATASET"
    )
    eval_tokens: int | None = _option(
        None, "Data", "Evaluate on this many tokens only. Default all.", metavar="N", least=2
    )
    seed: int = _option(0, "Data", "Seed of the windows drawn, of their order, and of the samples.", least=0)

    samples: int = _option(4096, "Block-AP", "Training windows, drawn at random; they may overlap.", least=1)
    seq_len: int | None = _option(
        None,
        "Block-AP",
        "Tokens in a window, evaluation included. Default 2048, or the model's context if shorter.",
        metavar="N",
        least=2,
    )
    val_samples: int = _option(
        64, "Block-AP", "Validation windows, for E2E-QP as well; a tenth of the text at most.", least=1
    )
    batch: int = _option(2, "Block-AP", "Windows a step.", least=1)
    epochs: int = _option(2, "Block-AP", "Passes over the windows; 0 is round-to-nearest.", least=0)
    lr_weight: float | None = _option(
        None,
        "Block-AP",
        "Learning rate of weights, and in Block-AP of norms and biases. Default 2e-5 at 2 bits, 1e-5 above. Here and "
        "below, E2E-QAT's too.",
        metavar="LR",
        least=0,
    )
    lr_scale: float = _option(1e-4, "Block-AP", "Learning rate of scales.", metavar="LR", least=0)
    lr_zero: float = _option(1e-4, "Block-AP", "Learning rate of zero-points.", metavar="LR", least=0)
    min_lr_factor: float = _option(
        20.0, "Block-AP", "The cosine schedule ends at the learning rate divided by this.", metavar="X", least=1
    )
    min_expert_tokens: int = _option(
        256, "Block-AP", "An expert that sees fewer training tokens stays rounded to the nearest.", least=0
    )
    weight_decay: float = _option(0.0, "Block-AP", "AdamW's weight decay, for E2E-QP as well.", metavar="X", least=0)

    e2e_samples: int = _option(4096, "End to end", "Training windows, or instruction examples.", least=1)
    e2e_seq_len: int | None = _option(
        None,
        "End to end",
        "Tokens in a window. Default 4096, or the model's context if shorter.",
        metavar="N",
        least=2,
    )
    e2e_batch: int = _option(32, "End to end", "Windows an optimizer step.", least=1)
    e2e_micro_batch: int | None = _option(
        None, "End to end", "Windows a forward pass. Default what fits in memory.", metavar="N", least=1
    )
    e2e_epochs: int = _option(1, "End to end", "Passes over the windows.", least=1)
    lr_e2e: float | None = _option(
        None, "End to end", "Peak learning rate of scales. Default 2e-5 at 2 bits, 1e-5 above.", metavar="LR", above=0
    )
    lr_norm: float = _option(1e-3, "End to end", "E2E-QAT's learning rate of norms and biases.", metavar="LR", least=0)
    distill: float = _option(
        1.0,
        "End to end",
        "Share of E2E-QAT's loss that is the divergence from the full-precision model; the rest is next-token loss.",
        metavar="X",
        least=0,
    )
    e2e_share: str = _option(
        "auto",
        "End to end",
        "Under torchrun, hold a rank's share only of E2E-QP's packed weights, and of E2E-QAT's full-precision model, "
        "and gather each layer's for use; auto does so where a GPU would be too full.",
        choices=("auto", "on", "off"),
    )
    warmup_ratio: float = _option(
        0.03, "End to end", "Share of the steps with a rising learning rate.", metavar="X", least=0
    )
    max_grad_norm: float = _option(0.3, "End to end", "Gradient norm to clip at; inf for none.", metavar="X", above=0)

    out: str | None = _option(
        None, "Output", "Checkpoint folder. Default eqat-out/MODEL-wBITSgGROUP.", metavar="FOLDER"
    )
    keep_block_ap: str | None = _option(
        None, "Output", "Keep Block-AP's checkpoint here when E2E-QP follows.", metavar="FOLDER"
    )
    work: str | None = _option(
        None, "Output", "Temporary files: finished blocks, activations. Default OUT.work.", metavar="FOLDER"
    )
    shard_size: str = _option("5GB", "Output", "Largest weight file, e.g. 500MB or 5GB.", metavar="SIZE")
    prompt: str | None = _option(
        None, "Output", "Start of the sample texts. Default the beginning of --eval-data.", metavar="TEXT"
    )
    sample_tokens: int = _option(60, "Output", "Length of the sample texts; 0 for none.", least=0)
    force: bool = _option(False, "Output", "Replace an existing checkpoint.")
    restart: bool = _option(False, "Output", "Discard what an unfinished run left, instead of going on with it.")

    device: str = _option("auto", "Hardware", "auto, cpu, cuda or cuda:N.", metavar="DEVICE")
    dtype: str = _option(
        "auto",
        "Hardware",
        "What to compute in; auto is bfloat16 on a GPU and float32 on a CPU.",
        choices=("auto", "float32", "bfloat16"),
    )
    activations: str = _option(
        "auto", "Hardware", "Where Block-AP keeps hidden states.", choices=("auto", "gpu", "ram", "disk")
    )
    activation_dtype: str = _option(
        "auto",
        "Hardware",
        "What Block-AP keeps hidden states in; auto is float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    execution: str = _option(
        "auto",
        "Hardware",
        "How Block-AP runs a step on a GPU: kernel by kernel (eager), as one CUDA graph (graph), compiled too "
        "(compile); auto is graph where that is possible.",
        choices=("auto", "eager", "graph", "compile"),
    )
    trust_remote_code: bool = _option(False, "Hardware", "Let Python files of the model folder run.")
