"""Will an engine load a checkpoint, and read it right?

One module an engine, each a table of rules as data: what the engine demands, in which of its files that stands, and at
which version it was read. ``facts`` looks at a checkpoint, ``judge`` applies the rules, nothing imports an engine.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING

from formats.errors import InputError

if TYPE_CHECKING:
    from .rules import Engine

__all__ = ["ENGINES", "get_engine"]

ENGINES = MappingProxyType(
    {
        "vllm": "eqat_export.lint.vllm",
        "sglang": "eqat_export.lint.sglang",
        "llama.cpp": "eqat_export.lint.llama_cpp",
        "mlx": "eqat_export.lint.mlx",
        "transformers": "eqat_export.lint.transformers",
        "gptqmodel": "eqat_export.lint.gptqmodel",
        "onnxruntime": "eqat_export.lint.onnxruntime",
    }
)


def get_engine(engine_id: str) -> Engine:
    """The rules of one engine.

    Raises:
        InputError: the engine is unknown.
    """
    if engine_id not in ENGINES:
        raise InputError(f"unknown engine {engine_id!r}; known are {', '.join(ENGINES)}")
    engine: Engine = importlib.import_module(ENGINES[engine_id]).ENGINE
    return engine
