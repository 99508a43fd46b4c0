"""The package ``onnx``, loaded when a graph is read or written."""

from __future__ import annotations

import importlib.util

from ..errors import MissingExtraError

__all__ = ["require_onnx"]


def require_onnx(purpose: str) -> None:
    """Raises MissingExtraError when it is not installed."""
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError("onnx", "onnx", purpose)
