"""A tokenizer's vocabulary, read by the library that owns it.

``tokenizer.json`` is read by the tokenizers library itself, which takes a tenth of a second. transformers, which takes
seconds to import, reads folders without that file and those whose ``tokenizer_config.json`` names tokens that the file
lacks: it adds them on loading.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .library import package

__all__ = ["Vocabulary", "load_vocabulary", "read_object"]


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer has.

    Attributes:
        tokens: id -> text as the tokenizer spells it.
        added: id -> the tokenizers library's AddedToken, for tokens beside the model or marked in it.
        around: whether encoding a text adds bos before and eos after it.
        file: ``tokenizer.json``, or what it would be.
    """

    tokens: Mapping[int, str]
    added: Mapping[int, Any]
    around: Mapping[str, bool]
    file: Mapping[str, Any]


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a folder with tokenizer.json, tokenizer.model, or vocab.json and merges.txt.

    Raises:
        CheckpointError: neither library loads it.
    """
    try:
        return _from_file(folder) or _from_transformers(folder)
    except CheckpointError:
        raise
    except Exception as exc:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"the tokenizer of {folder} does not load: {type(exc).__name__}: {exc}") from exc


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file.

    Raises:
        CheckpointError: it is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise CheckpointError(f"{path} is not JSON: {exc}") from exc
    return value if isinstance(value, dict) else {}


def _from_file(folder: Path) -> Vocabulary | None:
    path = folder / "tokenizer.json"
    file = read_object(path)
    if not file or file.get("model", {}).get("byte_fallback", False):
        return None  # transformers' Llama tokenizer builds its own around such a vocabulary
    config = read_object(folder / "tokenizer_config.json")
    backend = package("tokenizers").Tokenizer.from_file(str(path))
    ids = backend.get_vocab(with_added_tokens=True)
    named = dict(_named(config))
    if not set(named.values()) <= set(ids):
        return None
    encoded = backend.encode("a").ids
    around = {
        "bos": "bos_token" in named and encoded[:1] == [ids[named["bos_token"]]],
        "eos": "eos_token" in named and len(encoded) > 1 and encoded[-1:] == [ids[named["eos_token"]]],
    }
    stated = {name: config.get(f"add_{name}_token") for name in around}
    around |= {name: value for name, value in stated.items() if isinstance(value, bool)}
    tokens = {index: token for token, index in ids.items()}
    return Vocabulary(tokens, dict(backend.get_added_tokens_decoder()), around, file)


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every token that a tokenizer_config.json names, and under which key."""
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            yield key, text
    for index, entry in (config.get("added_tokens_decoder") or {}).items():
        yield f"added {index}", entry["content"]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or []
        for entry in listed.values() if isinstance(listed, dict) else listed:
            text = entry["content"] if isinstance(entry, dict) else entry
            yield f"{key} {text}", text


def _from_transformers(folder: Path) -> Vocabulary:
    tokenizer = package("transformers").AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    ids = tokenizer.encode("a")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    around = {
        "bos": bos is not None and ids[:1] == [bos],
        "eos": eos is not None and len(ids) > 1 and ids[-1:] == [eos],
    }
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    file = read_object(folder / "tokenizer.json") or json.loads(tokenizer.backend_tokenizer.to_str())
    return Vocabulary(tokens, tokenizer.added_tokens_decoder, around, file)
