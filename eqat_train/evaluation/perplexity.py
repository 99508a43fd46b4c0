"""Perplexity of a model on token windows, and sample texts.

Perplexity is ``exp`` of the mean cross-entropy over every label after the first position of each window: position 0 has
nothing to be predicted from, and -100 marks tokens that do not count. Logits are turned to fp32 for the loss, and the
sum is exact to float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from formats.errors import InputError

from ..data import NO_LOSS, TokenWindows
from ..reporting.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_windows", "generate_sample", "perplexity", "perplexity_of"]

# Tokens in a forward pass: enough to keep a device busy, few enough for the logits of a large vocabulary.
BATCH_TOKENS = 8192
# Sampling that keeps to what a model finds likely without the loops of greedy search.
TEMPERATURE = 0.7
TOP_K = 50


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: TokenWindows,
    reporter: Reporter | None = None,
    *,
    batch_size: int | None = None,
    title: str = "evaluating",
) -> float:
    """Perplexity of a causal language model in memory, in the dtype it is in.

    Args:
        model: on its device, in evaluation mode.
        windows: int64 token ids and labels ``[windows, seq_len]``.
        reporter: told of progress, one step a window.
        batch_size: windows a forward pass; None chooses by their length.
        title: of the progress task.

    Returns:
        The perplexity; infinity or NaN where the model's loss is.

    Raises:
        InputError: a token id outside the model's vocabulary, or no label at all.
    """
    check_windows(windows, cast(Tensor, model.get_input_embeddings().weight).shape[0])
    return perplexity_of(
        lambda _, ids: model(input_ids=ids, use_cache=False).logits,
        windows,
        model.device,
        batch_size or max(1, BATCH_TOKENS // windows.seq_len),
        reporter or Reporter(),
        title,
    )


def check_windows(windows: TokenWindows, vocabulary: int) -> None:
    """Refuses windows that a model cannot be measured on.

    Raises:
        InputError: a token id outside the model's vocabulary, or no label at all.
    """
    if not 0 <= int(windows.input_ids.min()) <= int(windows.input_ids.max()) < vocabulary:
        raise InputError(
            f"token ids reach {int(windows.input_ids.max())}; the model's vocabulary has {vocabulary} entries: "
            "tokenize with the model's own tokenizer"
        )
    if not windows.loss_tokens:
        raise InputError("no token of the evaluation windows takes part in the loss")


@torch.inference_mode()
def perplexity_of(
    logits_of: Callable[[int, Tensor], Tensor],
    windows: TokenWindows,
    device: torch.device,
    batch_size: int,
    reporter: Reporter,
    title: str,
) -> float:
    """Perplexity from logits.

    Args:
        logits_of: ``[batch, seq_len, vocabulary]`` of the windows from a number on, from their ids.
        windows: int64 token ids and labels ``[windows, seq_len]``.
        device: where the model is.
        batch_size: windows a forward pass.
        reporter: told of progress, one step a window.
        title: of the progress task.

    Returns:
        The perplexity; infinity or NaN where the model's loss is.
    """
    total, start = torch.zeros((), dtype=torch.float64, device=device), 0
    with reporter.task(title, len(windows)) as task:
        for batch in windows.batches(batch_size):
            ids, labels = batch.input_ids.to(device), batch.labels.to(device)
            logits = logits_of(start, ids)
            for row, targets in zip(logits, labels, strict=True):  # a row at a time: fp32 logits are large
                losses = F.cross_entropy(row[:-1].float(), targets[1:], ignore_index=NO_LOSS, reduction="none")
                total += losses.double().sum()
            task.update(len(batch))
            start += len(batch)
    mean = total.item() / windows.loss_tokens
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


@torch.inference_mode()
def generate_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, seed: int = 0
) -> str:
    """A continuation of a prompt, sampled at temperature 0.7 among the 50 likeliest tokens; the same for one seed.

    Returns:
        The continuation without the prompt, up to the end of the text or ``max_new_tokens``.
    """
    from transformers import GenerationConfig  # noqa: PLC0415

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(torch.int64)
    if ids.shape[1] > 1 and ids[0, -1] == tokenizer.eos_token_id:
        ids = ids[:, :-1]
    if not ids.numel():
        ids = torch.tensor([[tokenizer.eos_token_id]])
    ids = ids.to(model.device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        output = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
