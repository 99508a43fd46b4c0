"""Instruction data: windows with the loss on the answers only.

A row holds ``messages``, or ``instruction``, ``output`` and optionally ``input``. The latter become a conversation of
two turns when the tokenizer has a chat template, and the Alpaca prompt otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from formats.errors import InputError

from ..reporting.progress import Reporter
from .chat import encode_conversation
from .sources import DataSource
from .streams import VALIDATION_SHARE, end_of_text_id
from .token_cache import cached, tokenizer_fingerprint
from .windows import NO_LOSS, TokenWindows

__all__ = ["InstructionWindows", "instruction_windows"]

Row = Mapping[str, Any]
Item = TypeVar("Item")

ALPACA = (
    "Below is an instruction that describes a task{context}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
ALPACA_CONTEXT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class InstructionWindows:
    """Instruction data ready for training.

    Attributes:
        train: training windows.
        validation: windows of other examples; None when there are too few to spare one.
        dropped: examples left out because the whole answer lies beyond the window.
        truncated: examples kept whose answer, or a later one, is cut.
    """

    train: TokenWindows
    validation: TokenWindows | None
    dropped: int
    truncated: int


def instruction_windows(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    samples: int,
    validation_samples: int,
    seed: int,
    reporter: Reporter | None = None,
) -> InstructionWindows:
    """Random examples as windows, right-padded to the longest of them and cut at ``seq_len``.

    Every example is used once at the most; a tenth of them at the most is for validation.

    Raises:
        InputError: rows without the columns, or no answer within ``seq_len`` tokens at all.
    """

    def build(path: Path) -> None:
        if reporter:
            reporter.message(f"Tokenizing {source.name} (kept for the next run)")
        rows = _draw(enumerate(source.rows(), 1), samples + validation_samples, seed)
        examples = [encode_example(row, tokenizer, f"{source.name} row {number}") for number, row in rows]
        save_file(_collate(examples, seq_len, end_of_text_id(tokenizer)), path)

    stored = cached(
        ".safetensors",
        build,
        load_file,
        kind="instructions",
        data=source.fingerprint,
        tokenizer=tokenizer_fingerprint(tokenizer),
        seq_len=seq_len,
        samples=samples + validation_samples,
        seed=seed,
    )
    dropped, truncated = stored["counts"].tolist()
    kept = len(stored["input_ids"])
    if not kept:
        raise InputError(
            f"{source.name}: none of {dropped} examples has a part of its answer in its first {seq_len} tokens; "
            "raise --e2e-seq-len"
        )
    windows = TokenWindows(stored["input_ids"].long(), stored["labels"].long())
    spared = min(validation_samples, kept // VALIDATION_SHARE)
    train = windows.take(slice(0, min(samples, kept - spared)))
    validation = windows.take(slice(kept - spared, kept)) if spared else None
    return InstructionWindows(train, validation, dropped, truncated)


def encode_example(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[int]]:
    """Token ids of one row and its labels, -100 outside the answers.

    Raises:
        InputError: the row has neither a conversation nor instruction and output strings.
    """
    if row.get("messages") is not None:
        return encode_conversation(row["messages"], tokenizer, where)
    fields = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
    for name, value in fields.items():
        if not isinstance(value, str) or (name != "input" and not value):
            raise InputError(f"{where}: {name} is {row.get(name)!r}; expected a string")
    if tokenizer.chat_template is not None:
        question = "\n\n".join(filter(None, (fields["instruction"], fields["input"])))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": fields["output"]}]
        return encode_conversation(turns, tokenizer, where)
    prompt = ALPACA.format(
        context=ALPACA_CONTEXT if fields["input"] else "",
        instruction=fields["instruction"],
        input=f"### Input:\n{fields['input']}\n\n" if fields["input"] else "",
    )
    end = end_of_text_id(tokenizer)
    asked = tokenizer(prompt, verbose=False)["input_ids"]
    if asked[-1] == end:
        asked = asked[:-1]
    answer = [*tokenizer(fields["output"], add_special_tokens=False, verbose=False)["input_ids"], end]
    return asked + answer, [NO_LOSS] * len(asked) + answer


def _draw(items: Iterable[Item], count: int, seed: int) -> list[Item]:
    """``count`` items at random, in random order, holding no more than that (reservoir sampling)."""
    draw = np.random.Generator(np.random.PCG64(seed))
    kept: list[Item] = []
    for index, item in enumerate(items):
        place = int(draw.integers(0, index + 1))
        if index < count:
            kept.append(item)
            kept[place], kept[-1] = kept[-1], kept[place]
        elif place < count:
            kept[place] = item
    return kept


def _collate(examples: Iterable[tuple[list[int], list[int]]], seq_len: int, padding: int) -> dict[str, torch.Tensor]:
    kept: list[tuple[list[int], list[int]]] = []
    dropped = truncated = 0
    for ids, labels in examples:
        inside = labels[:seq_len]
        # position 0 is never predicted
        if all(label == NO_LOSS for label in inside[1:]):
            dropped += 1
            continue
        truncated += any(label != NO_LOSS for label in labels[seq_len:])
        kept.append((ids[:seq_len], inside))
    longest = max((len(ids) for ids, _ in kept), default=0)
    input_ids = np.full((len(kept), longest), padding, dtype=np.int32)
    targets = np.full((len(kept), longest), NO_LOSS, dtype=np.int32)
    for row, (ids, labels) in enumerate(kept):
        input_ids[row, : len(ids)] = ids
        targets[row, : len(labels)] = labels
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(targets),
        "counts": torch.tensor([dropped, truncated]),
    }
