"""The packages that know GGUF and tokenizers, loaded when a file is written or read."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..errors import MissingExtraError

__all__ = ["gguf_package", "package"]


def gguf_package() -> Any:
    """llama.cpp's own Python package: names, metadata keys, tokenizer readers.

    Raises:
        MissingExtraError: it is not installed.
    """
    return package("gguf")


def package(name: str) -> Any:
    """A package by its import name.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(name, "gguf", "GGUF")
    return importlib.import_module(name)
