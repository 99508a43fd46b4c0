"""The tokenizer of a Hugging Face folder as llama.cpp's metadata.

The libraries that own it read it: tokenizers, transformers, sentencepiece or ``gguf.LlamaHfVocab`` the vocabulary,
``gguf.SpecialVocab`` merges, special tokens and chat templates, as in llama.cpp's own converter. Like it, this does not
use ``gguf.BpeVocab``: that takes ``vocab.json`` where there is one, and then misses tokens that only
``tokenizer.json`` adds (Qwen2), and calls special tokens inside the vocabulary normal.

Three kinds: byte-level BPE (``gpt2``; Llama 3, Qwen, Mistral NeMo), SentencePiece (``llama``; Llama 2, Mistral 7B), and
the same vocabulary as BPE with byte fallback where there is only ``tokenizer.json``. llama.cpp merges by score there;
``gguf.LlamaHfVocab`` gives every token the same one, which cuts words apart from the left. The score of a token is
minus the rank of the merge that makes it, which is the order that the merges were made from.
Source: ``conversion/base.py`` (``get_vocab_base``, ``_create_vocab_sentencepiece``), llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .keys import MERGES, head_bytes, metadata_bytes
from .library import gguf_package, package
from .pre_tokenizers import recognise
from .vocabulary import Vocabulary, load_vocabulary, read_object

__all__ = ["add_tokenizer", "copy_tokenizer", "write_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_LOGGER = "gguf.vocab"


def add_tokenizer(writer: Any, folder: Path, vocabulary: int, pre_tokenizer: str | None) -> bool:
    """Adds the tokenizer of ``folder`` to a ``gguf.GGUFWriter``.

    Args:
        writer: takes the keys.
        folder: holds tokenizer.json, tokenizer.model or vocab.json with merges.txt.
        vocabulary: rows of the embedding; ids that the tokenizer lacks become unused tokens.
        pre_tokenizer: llama.cpp's name of a byte-level tokenizer's split; None recognises it.

    Returns:
        Whether the tokenizer has merges and they are none: the one array that the gguf package cannot write.

    Raises:
        CheckpointError: there is no tokenizer, it has more ids than the embedding rows, or its split is not known.
    """
    if not any((folder / name).exists() for name in _FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer ({', '.join(_FILES)}); a GGUF file carries one, copy it there"
        )
    known = load_vocabulary(folder)
    model = known.file.get("model", {})
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"the tokenizer of {folder} is {model.get('type')}; BPE and SentencePiece's BPE are written"
        )
    tokens, scores, types = _placeholders(vocabulary)
    byte_level = not model.get("byte_fallback", False)
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer or recognise(known.file))
        _fill(tokens, types, known.tokens, vocabulary)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        for index, (token, score, kind) in enumerate(_pieces(folder, model)):
            _check_id(index, vocabulary)
            tokens[index], scores[index], types[index] = token, score, kind
    _add_special(known, tokens, scores, types)
    writer.add_token_list(tokens)
    if not byte_level:
        writer.add_token_scores(scores)
        prefix = read_object(folder / "tokenizer_config.json").get("add_prefix_space")
        if isinstance(prefix, bool):
            writer.add_add_space_prefix(prefix)
    writer.add_token_types(types)
    with _quiet():
        special = gguf_package().SpecialVocab(folder, load_merges=byte_level, n_vocab=vocabulary)
        special.add_special_token |= known.around  # it guesses from templates
        special.add_to_gguf(writer, quiet=True)
    return byte_level and not special.merges


def copy_tokenizer(writer: Any, metadata: Mapping[str, Any]) -> bool:
    """Adds the tokenizer of another GGUF file, key by key; returns what :func:`add_tokenizer` does."""
    values = gguf_package().GGUFValueType
    for key, value in metadata.items():
        if not key.startswith("tokenizer.") or value == []:
            continue
        kind = values.ARRAY if isinstance(value, list) else values.get_type(value)
        if isinstance(value, int) and not isinstance(value, bool):
            kind = values.UINT32  # as every tokenizer key is
        writer.add_key_value(key, value, kind)
    return metadata.get(MERGES) == []


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Saves the tokenizer of a GGUF file as transformers builds it.

    It is given the tokenizer's metadata in a file of their own: its reader stops at block types it does not know.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    entries, count = metadata_bytes(metadata["general.architecture"], lambda writer: copy_tokenizer(writer, metadata))
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tokenizer.gguf").write_bytes(head_bytes(0, count) + entries)
        try:
            tokenizer = package("transformers").AutoTokenizer.from_pretrained(scratch, gguf_file="tokenizer.gguf")
        except Exception as exc:  # the tokenizers library raises nothing narrower
            raise CheckpointError(f"transformers does not build the tokenizer: {type(exc).__name__}: {exc}") from exc
    tokenizer.save_pretrained(folder)


def _placeholders(vocabulary: int) -> tuple[list[str], list[float], list[int]]:
    unused = int(gguf_package().TokenType.UNUSED)
    return [f"[PAD{index}]" for index in range(vocabulary)], [-10000.0] * vocabulary, [unused] * vocabulary


def _fill(tokens: list[str], types: list[int], vocabulary: Mapping[int, str], rows: int) -> None:
    normal = int(gguf_package().TokenType.NORMAL)
    for index, token in vocabulary.items():
        _check_id(index, rows)
        tokens[index], types[index] = token, normal


def _check_id(index: int, rows: int) -> None:
    if index >= rows:
        raise CheckpointError(f"the tokenizer has id {index}, the embedding {rows} rows; they do not belong together")


def _pieces(folder: Path, model: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """Token, score and type of a SentencePiece vocabulary, by id."""
    gguf = gguf_package()
    if (folder / "tokenizer.model").is_file():
        vocabulary = gguf.SentencePieceVocab(folder)
        return [(bytes(text).decode(), score, int(kind)) for text, score, kind in vocabulary.all_tokens()]
    vocabulary = gguf.LlamaHfVocab(folder)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    texts = ((bytes(text).decode(), score, int(kind)) for text, score, kind in vocabulary.all_tokens())
    return [(text, -float(ranks[text]) if text in ranks else score, kind) for text, score, kind in texts]


def _add_special(vocabulary: Vocabulary, tokens: list[str], scores: list[float], types: list[int]) -> None:
    """Marks added tokens: control tokens, which text cannot spell, and others, which are matched whole."""
    kinds = gguf_package().TokenType
    for index, token in vocabulary.added.items():
        _check_id(index, len(tokens))
        text = token.content
        control = token.special or (text.startswith("<|") and text.endswith("|>"))
        tokens[index] = text if control else text.replace("\u2581", " ")
        types[index] = int(kinds.CONTROL if control else kinds.USER_DEFINED)
        scores[index] = -1000.0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the gguf package's remarks on templates and merges, which are settled here."""
    logger = logging.getLogger(_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
