"""GGUF: one file that llama.cpp runs."""

from .format import GgufFormat

__all__ = ["GgufFormat"]
