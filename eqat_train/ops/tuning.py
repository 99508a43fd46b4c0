"""Autotuning of Triton kernels: over a small stated space, once a machine.

Timings are kept in Triton's cache folder (``TRITON_CACHE_DIR``), so a later run takes the same configuration without
measuring. A kernel's ``key`` names only what stays the same through a run (shapes of layers, never the number of
tokens), so nothing is tuned in the middle of training; and a CUDA graph is captured only after a first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton

__all__ = ["autotune"]


def autotune(configs: Sequence[triton.Config], key: Sequence[str], **options: Any) -> Callable[[Any], Any]:
    """``triton.autotune`` with its results kept on disk; under the interpreter, the first configuration alone.

    Args:
        configs: the space.
        key: arguments whose values choose a configuration.
        options: ``triton.autotune``'s others.
    """
    chosen = configs[:1] if triton.knobs.runtime.interpret else configs
    return triton.autotune(list(chosen), list(key), cache_results=True, **options)
