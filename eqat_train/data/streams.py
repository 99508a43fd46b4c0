"""Text to one long stream of token ids, and windows of it.

The protocol, for training and evaluation alike: each document is tokenized without special tokens, the end-of-text id
is appended, and all of it is concatenated. Evaluation reads non-overlapping windows from the start and drops the ragged
tail; training draws random windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from formats.errors import InputError

from ..reporting.progress import Reporter
from .sources import DataSource
from .token_cache import cached, tokenizer_fingerprint
from .windows import TokenWindows

__all__ = ["evaluation_windows", "token_stream", "training_windows"]

TokenStream = NDArray[np.int32]  # [tokens]

# Characters tokenized at once: enough to keep every core busy, little enough to bound memory.
BATCH_CHARACTERS = 4 * 2**20
# Validation never takes more than this part of the text from training.
VALIDATION_SHARE = 10


def token_stream(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, reporter: Reporter | None = None
) -> TokenStream:
    """Token ids of a text source, memory-mapped from the cache: int32 ``[tokens]``.

    Raises:
        InputError: no text column, no end-of-text token, or no text.
    """
    end = end_of_text_id(tokenizer)

    def build(path: Path) -> None:
        if reporter:
            reporter.message(f"Tokenizing {source.name} (kept for the next run)")
        if not _write_stream(path, _tokenize(source.texts(), tokenizer, end)):
            raise InputError(f"{source.name} holds no text")

    return cached(
        ".npy",
        build,
        _read_stream,
        kind="text",
        data=source.fingerprint,
        tokenizer=tokenizer_fingerprint(tokenizer),
        end=end,
    )


def _read_stream(path: Path) -> TokenStream:
    stream: TokenStream = np.load(path, mmap_mode="r", allow_pickle=False)  # refuses a truncated file
    return stream


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that ends a document.

    Raises:
        InputError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos_token to end documents with; set eos_token in tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def evaluation_windows(stream: TokenStream, seq_len: int, tokens: int | None = None) -> TokenWindows:
    """Non-overlapping windows from the start of a stream; the ragged tail is dropped.

    Args:
        stream: int32 ``[tokens]``.
        seq_len: tokens in a window.
        tokens: read only this many tokens of the stream; None means all.

    Raises:
        InputError: the text is shorter than one window.
    """
    part = stream[:tokens]
    count = len(part) // seq_len
    if not count:
        raise InputError(
            f"the evaluation text has {len(part)} tokens, less than one window of {seq_len}; "
            f"give a longer text or --seq-len {max(2, len(part))} at most"
        )
    ids = np.array(part[: count * seq_len], dtype=np.int64).reshape(count, seq_len)
    return TokenWindows.from_ids(torch.from_numpy(ids))


def training_windows(
    stream: TokenStream, seq_len: int, samples: int, validation_samples: int, seed: int
) -> tuple[TokenWindows, TokenWindows]:
    """Random training windows, and validation windows that share no token position with them.

    The stream is cut into blocks of ``seq_len``. Some blocks, at random and at most a tenth of them (but at least one),
    are the validation windows; training windows start anywhere between them.

    Args:
        stream: int32 ``[tokens]``.
        seq_len: tokens in a window.
        samples: training windows; they may overlap each other.
        validation_samples: validation windows wanted, at least one.
        seed: decides every draw.

    Returns:
        Training windows, ``samples`` of them, and validation windows, ``validation_samples`` of them or fewer.

    Raises:
        InputError: the text has less than two windows.
    """
    blocks = len(stream) // seq_len
    if blocks < 2:
        raise InputError(
            f"the training text has {len(stream)} tokens; windows of {seq_len} need at least {2 * seq_len} "
            f"(one to train, one to validate): give more text or --seq-len {max(2, len(stream) // 2)} at most"
        )
    draw = np.random.Generator(np.random.PCG64(seed))
    held_out = min(validation_samples, max(1, blocks // VALIDATION_SHARE))
    validation = np.sort(draw.choice(blocks, size=held_out, replace=False))

    # Stretches of text between validation blocks, and how many windows can start in each.
    begins = np.concatenate(([0], (validation + 1) * seq_len))
    ends = np.concatenate((validation * seq_len, [len(stream)]))
    room = np.maximum(ends - begins - seq_len + 1, 0)
    picks = draw.integers(0, room.sum(), size=samples)
    stretch = np.searchsorted(np.cumsum(room), picks, side="right")
    starts = begins[stretch] + picks - (np.cumsum(room) - room)[stretch]
    return _cut(stream, starts, seq_len), _cut(stream, validation * seq_len, seq_len)


def _cut(stream: TokenStream, starts: Iterable[int], seq_len: int) -> TokenWindows:
    ids = np.stack([stream[start : start + seq_len] for start in starts]).astype(np.int64)
    return TokenWindows.from_ids(torch.from_numpy(ids))


def _tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, end: int) -> Iterator[NDArray[np.int32]]:
    for batch in _batches(texts):
        encoded = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        ids = chain.from_iterable((*document, end) for document in encoded["input_ids"])
        yield np.fromiter(ids, dtype=np.int32)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_stream(path: Path, chunks: Iterable[NDArray[np.int32]]) -> int:
    """Writes chunks as one ``.npy`` vector, without knowing its length before; returns that length."""
    with path.open("wb") as file:
        _write_header(file, 0)
        begin = file.tell()
        count = 0
        for chunk in chunks:
            chunk.tofile(file)
            count += len(chunk)
        file.flush()
        file.seek(0)
        # numpy pads the header so that a vector's length can grow in place
        _write_header(file, count)
        if file.tell() != begin:
            raise RuntimeError("numpy wrote .npy headers of two sizes")
    return count


def _write_header(file: object, count: int) -> None:
    header = {"descr": "<i4", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
