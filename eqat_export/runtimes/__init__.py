"""The real readers of each format, used as proof.

One literal table, runtime id -> ``"module:Class"``, loaded when asked for.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING

from formats.errors import InputError

if TYPE_CHECKING:
    from .base import Runtime

__all__ = ["RUNTIMES", "get_runtime"]

RUNTIMES = MappingProxyType(
    {
        "gptqmodel": "eqat_export.runtimes.gptqmodel:GptqmodelRuntime",
        "bitblas": "eqat_export.runtimes.bitblas:BitblasRuntime",
        "humming": "eqat_export.runtimes.humming:HummingRuntime",
        "onnxruntime": "eqat_export.runtimes.onnxruntime:OnnxruntimeRuntime",
        "llama.cpp": "eqat_export.runtimes.llama_cpp:LlamaCppRuntime",
        "auto-round": "eqat_export.runtimes.auto_round:AutoRoundRuntime",
        "mlx": "eqat_export.runtimes.mlx:MlxRuntime",
        "transformers": "eqat_export.runtimes.transformers:TransformersRuntime",
    }
)


def get_runtime(runtime_id: str) -> Runtime:
    """The runtime with this id.

    Raises:
        InputError: the id is unknown.
    """
    if runtime_id not in RUNTIMES:
        raise InputError(f"unknown runtime {runtime_id!r}; known are {', '.join(RUNTIMES)}")
    module, _, attribute = RUNTIMES[runtime_id].partition(":")
    return getattr(importlib.import_module(module), attribute)()
