"""Tokenised data on disk, under a fingerprint of everything it was made from.

Entries live in ``$EQAT_CACHE``, or in ``eqat`` below ``$XDG_CACHE_HOME`` or ``~/.cache``. An entry's name is a hash of
the data's content, the tokenizer, the settings and the version of this code, so a stale entry is never read. Entries
are written to a temporary neighbour and renamed: concurrent writers each finish with the same complete file. An entry
that cannot be read (truncated, say) is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from formats.errors import InputError

__all__ = ["cache_folder", "cached", "tokenizer_fingerprint"]

Entry = TypeVar("Entry")

# Raise when the same data and settings would give other tokens or another file layout.
CODE_VERSION = 1


def cache_folder() -> Path:
    """Folder of the cache; it need not exist yet."""
    chosen = os.environ.get("EQAT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "eqat"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the whole tokenizer: vocabulary, merges, normalisation, special tokens and chat template."""
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} has no tokenizer.json; convert it to a fast tokenizer first")
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    content = f"{tokenizer.backend_tokenizer.to_str()}\n{template}\n{tokenizer.special_tokens_map}"
    return hashlib.sha256(content.encode()).hexdigest()


def cached(suffix: str, build: Callable[[Path], None], read: Callable[[Path], Entry], **made_from: Any) -> Entry:
    """A cache entry, built now if it is not there or is damaged.

    Args:
        suffix: file name ending, with its dot.
        build: writes the entry to the path it is given.
        read: gives its content; raises ValueError, EOFError or SafetensorError when the file is damaged.
        made_from: JSON values that decide the content.

    Raises:
        InputError: the cache cannot be written.
    """
    key = json.dumps({**made_from, "version": CODE_VERSION}, sort_keys=True)
    entry = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}{suffix}"
    if entry.exists():
        with suppress(ValueError, EOFError, SafetensorError):
            return read(entry)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".writing-", suffix=suffix, dir=entry.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            build(temporary)
            os.replace(temporary, entry)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write the token cache {entry.parent}: {error.strerror or error}; "
            "set EQAT_CACHE to a folder with room"
        ) from error
    return read(entry)
