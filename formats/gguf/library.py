"""The gguf package, loaded when a file is written or read."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..errors import MissingExtraError

__all__ = ["gguf_package", "transformers_package"]


def gguf_package() -> Any:
    """llama.cpp's own Python package: names, metadata keys, tokenizer readers.

    Raises:
        MissingExtraError: it is not installed.
    """
    return _package("gguf")


def transformers_package() -> Any:
    """transformers, which the gguf package's tokenizer readers use as well."""
    return _package("transformers")


def _package(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(name, "gguf", "GGUF")
    return importlib.import_module(name)
