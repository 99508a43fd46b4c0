"""GGUF files as other tools write them: by the gguf package's writer and quantizers, without a key of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["rewritten"]


def rewritten(source: Path, out: Path, type_of: Callable[[str], str], metadata: dict[str, Any] | None = None) -> Path:
    """The same model quantized anew by the gguf package.

    Args:
        source: a file whose types the gguf package knows.
        out: the new file.
        type_of: ggml name of a matrix -> its new type.
        metadata: entries to replace or add; numbers become uint32 and float32.
    """
    import gguf  # noqa: PLC0415

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "eqat.")) or key in ("general.architecture", *(metadata or {})) or not field.data:
            continue
        sub_type = field.types[1] if len(field.types) > 1 else None
        # the package writes no empty array, so the tiny tokenizer gets a merge and a token for it
        value = [*field.contents()[:-1], "ab"] if key == "tokenizer.ggml.tokens" else field.contents()
        writer.add_key_value(key, value, field.types[0], sub_type)
    for key, value in (metadata or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    writer.add_key_value("tokenizer.ggml.merges", ["a b"], gguf.GGUFValueType.ARRAY)
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if weight.ndim == 1:
            writer.add_tensor(tensor.name, np.ascontiguousarray(weight, np.float32))
            continue
        kind = gguf.GGMLQuantizationType[type_of(tensor.name)]
        blocks = gguf.quantize(weight.reshape(tuple(reversed(tensor.shape.tolist()))).astype(np.float32), kind)
        writer.add_tensor(tensor.name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
