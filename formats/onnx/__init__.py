"""ONNX Runtime: MatMulNBits weights inside a graph of the whole model. Layout, readers and sources: ``../onnx.md``.

``layout`` holds one layer's tensors, ``decoder`` reads what the graph needs from config.json, ``graph`` builds it,
``writer`` and ``reader`` are the folder with its external data, ``format`` puts them together. The package ``onnx`` is
loaded only to build or read a graph.
"""

from .format import OnnxFormat

__all__ = ["OnnxFormat"]
