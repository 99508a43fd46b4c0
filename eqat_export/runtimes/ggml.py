"""ggml itself, through the libraries that llama-cpp-python installs: its reading of a file and of each block type.

``gguf_init_from_file`` parses the file, ``ggml_get_type_traits(type)->to_float`` turns a tensor's bytes into fp32: the
functions that llama.cpp itself loads and dequantizes with. Source: ``ggml/include/gguf.h`` and ``ggml.h``
(``struct ggml_type_traits``), llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.errors import CheckpointError

__all__ = ["GgmlFile"]

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


class _InitParameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


class GgmlFile:
    """A GGUF file as ggml parses it; a context manager.

    Raises:
        CheckpointError: ggml does not read the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ggml = _library()
        self._context = self._ggml.gguf_init_from_file(str(path).encode(), _InitParameters(True, None))
        if not self._context:
            raise CheckpointError(f"ggml does not read {path}")

    def weights(self, name: str, columns: int) -> Tensor | None:
        """A tensor as fp32 ``[rows, columns]``, dequantized by ggml; None if the file has none of that name."""
        index = self._ggml.gguf_find_tensor(self._context, name.encode())
        if index < 0:
            return None
        start = self._ggml.gguf_get_data_offset(self._context) + self._ggml.gguf_get_tensor_offset(self._context, index)
        size = self._ggml.gguf_get_tensor_size(self._context, index)
        traits = self._ggml.ggml_get_type_traits(self._ggml.gguf_get_tensor_type(self._context, index)).contents
        data = np.array(np.memmap(self.path, np.uint8, "r", start, (size,)))
        count = size // traits.block_bytes * traits.block
        values = torch.empty(count, dtype=torch.float32)
        if traits.to_float:
            _TO_FLOAT(traits.to_float)(data.ctypes.data, values.data_ptr(), count)
        else:  # fp32 needs no conversion
            values = torch.from_numpy(data).view(torch.float32)
        return values.view(-1, columns)

    def __enter__(self) -> GgmlFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._ggml.gguf_free(self._context)


@cache
def _library() -> Any:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise CheckpointError("llama_cpp has no folder to load ggml from")
    found = sorted((Path(spec.origin).parent / "lib").glob("libggml-base.*"))
    if not found:
        raise CheckpointError(f"{Path(spec.origin).parent / 'lib'} has no libggml-base; reinstall llama-cpp-python")
    library = ctypes.CDLL(str(found[0]))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParameters]
    library.gguf_free.restype = None
    library.gguf_free.argtypes = [ctypes.c_void_p]
    library.gguf_find_tensor.restype = ctypes.c_int64
    library.gguf_find_tensor.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    for name in ("gguf_get_tensor_offset", "gguf_get_tensor_size"):
        getattr(library, name).restype = ctypes.c_size_t
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.gguf_get_tensor_type.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.gguf_get_data_offset.restype = ctypes.c_size_t
    library.gguf_get_data_offset.argtypes = [ctypes.c_void_p]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library
