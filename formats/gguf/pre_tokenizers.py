"""How a byte-level tokenizer splits text before its merges, under llama.cpp's names.

llama.cpp implements each split by hand and knows it by name (``tokenizer.ggml.pre``). Its converter recognises a
tokenizer by a hash of the ids that it gives a fixed text, which names known vocabularies and no other. Here the split
itself is compared: the ``pre_tokenizer`` of ``tokenizer.json`` and ``ignore_merges``, which a name implies as well.
Source: ``llama_vocab::impl::load`` and ``llm_tokenizer_bpe`` in ``src/llama-vocab.cpp``, llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

__all__ = ["NAMES", "recognise"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"

# (regex, ignore_merges) -> name
_BY_REGEX = {
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}", True): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}", False): "smaug-bpe",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}", False): "qwen2",
    (
        rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
        True,
    ): "tekken",
}
# Names that --pre-tokenizer may give: those above, and others of llama.cpp's that models of our families use.
NAMES = (
    "gpt-2",
    "llama-bpe",
    "smaug-bpe",
    "qwen2",
    "qwen35",
    "tekken",
    "smollm",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "deepseek-r1-qwen",
    "falcon3",
    "gpt-4o",
    "default",
)


def recognise(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text.

    Args:
        tokenizer: ``tokenizer.json``.

    Raises:
        CheckpointError: it is none of the splits known here.
    """
    normalizer = tokenizer.get("normalizer")
    # llama.cpp normalizes nothing; NFC leaves nearly all text as it is, and llama.cpp's own converter lets it pass
    plain = normalizer is None or normalizer.get("type") == "NFC"
    name = _name(tokenizer) if plain else None
    if name is None:
        what = "normalizer" if not plain else "pre_tokenizer"
        raise CheckpointError(
            f"llama.cpp's name for this tokenizer is not known: its {what} is {_brief(tokenizer.get(what))}; "
            f"if you know it, give --pre-tokenizer {'|'.join(NAMES)}"
        )
    return name


def _name(tokenizer: Mapping[str, Any]) -> str | None:
    steps = _steps(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer.get("model", {}).get("ignore_merges", False))
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}] if not ignore_merges:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ] if not ignore_merges:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return _BY_REGEX.get((regex, ignore_merges))
    return None


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [step for part in pre_tokenizer.get("pretokenizers", []) for step in _steps(part)]
    return [pre_tokenizer]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
