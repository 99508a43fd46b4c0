"""Reading a GGUF file as a model: transformers' names, its configuration, and blocks or dense tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..safetensors_header import TensorInfo
from .blocks import BLOCK_TYPES, UNIT, unpack_blocks
from .decoding import decode_blocks
from .families import NameMap, family_of_architecture, permutation
from .header import ROPE_FREQS, SCHEME_KEY, GgufTensor, read_header
from .library import gguf_package
from .metadata import read_config
from .tokenizer import write_tokenizer

__all__ = ["GgufReader"]

_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Matrices that other formats hold in full precision: dequantized here, exactly, as fp32.
_OUTER = ("token_embd.weight", "output.weight")


class GgufReader:
    """A ``.gguf`` file; a context manager.

    Attributes:
        folder: the file.
        metadata: every metadata entry.
        config: what ``config.json`` would say.
        quantization_config: scheme of the layers; theirs where the file is ours, else that of their blocks.
        tensors: read-only name -> TensorInfo. A layer's blocks are ``{layer}.blocks``, uint8 ``[out, in / 32, bytes]``.

    Raises:
        CheckpointError: the file is damaged, of a family or a block type that is not read, or misses something.
        MissingExtraError: the gguf package is not installed.
    """

    def __init__(self, path: Path | str) -> None:
        self.folder = Path(path)
        header = read_header(self.folder)
        self.metadata = header.metadata
        self._stored = header.tensors
        try:
            self._family = family_of_architecture(self.metadata.get("general.architecture"))
            factors = self._dense(header.tensors[ROPE_FREQS]) if ROPE_FREQS in header.tensors else None
            shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
            self.config = read_config(self.metadata, shapes, factors)
            self._modules = NameMap(self._family, self.config["num_hidden_layers"]).to_transformers()
            self._sources: dict[str, str] = {}
            infos = dict(self._info(name, tensor) for name, tensor in header.tensors.items() if name != ROPE_FREQS)
            self.tensors: Mapping[str, TensorInfo] = MappingProxyType(infos)
            self.quantization_config = self._quantization()
        except CheckpointError as exc:
            raise CheckpointError(f"{self.folder}: {exc}") from exc
        self._closed = False

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU, its rows in transformers' order.

        Raises:
            CheckpointError: there is no such tensor, or the reader is closed.
        """
        if self._closed:
            raise CheckpointError(f"{self.folder} is closed; read its tensors inside the with block")
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}; it has {len(self.tensors)} others")
        stored = self._stored[self._sources[name]]
        if name.endswith(".blocks"):
            kind = BLOCK_TYPES[stored.type]
            data = self._bytes(stored).view(stored.shape[0], stored.shape[1] // UNIT, kind.unit_bytes)
        else:
            data = self._dense(stored)
        order = permutation(self._family, self.config, name, data.shape[0])
        return data if order is None else data.index_select(0, torch.argsort(order))

    def close(self) -> None:
        """Makes further reads an error; tensors already read stay valid."""
        self._closed = True

    def write_companions(self, folder: Path) -> None:
        """The tokenizer as files of a Hugging Face folder, as transformers builds it from the metadata.

        Raises:
            CheckpointError: transformers cannot build it.
        """
        try:
            write_tokenizer(self.metadata, folder)
        except CheckpointError as exc:
            raise CheckpointError(f"{self.folder}: {exc}") from exc

    def __enter__(self) -> GgufReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, ggml_name: str, stored: GgufTensor) -> tuple[str, TensorInfo]:
        module, _, suffix = ggml_name.rpartition(".")
        if module not in self._modules or suffix not in ("weight", "bias"):
            raise CheckpointError(f"tensor {ggml_name!r} is not one of {self._family.causal_lm}'s")
        name, shape = f"{self._modules[module]}.{suffix}", stored.shape
        if stored.type in _DENSE:
            info = TensorInfo(_DENSE[stored.type], shape, stored.nbytes, self.folder.name)
        elif ggml_name in _OUTER and not self._is_own_head(ggml_name, stored):
            info = TensorInfo(torch.float32, shape, 4 * shape[0] * shape[1], self.folder.name)
        elif stored.type in BLOCK_TYPES and len(shape) == 2 and suffix == "weight":
            name = f"{self._modules[module]}.blocks"
            kind = BLOCK_TYPES[stored.type]
            info = TensorInfo(
                torch.uint8, (shape[0], shape[1] // UNIT, kind.unit_bytes), stored.nbytes, self.folder.name
            )
        else:
            raise CheckpointError(
                f"tensor {ggml_name} is {stored.type}, whose scales are themselves quantized or looked up, so that it "
                f"has no codes with a scale and a zero-point; {', '.join(BLOCK_TYPES)} have. Dequantize the file with "
                "transformers (from_pretrained with gguf_file=) and quantize that"
            )
        self._sources[name] = ggml_name
        return name, info

    def _is_own_head(self, ggml_name: str, stored: GgufTensor) -> bool:
        """A head that was a quantized layer of the checkpoint a file of ours was made from."""
        return ggml_name == "output.weight" and SCHEME_KEY in self.metadata and stored.type in BLOCK_TYPES

    def _quantization(self) -> dict[str, Any]:
        """Ours as written; otherwise each layer's block type, the most frequent one model-wide."""
        types = {
            name.removesuffix(".blocks"): self._stored[self._sources[name]].type
            for name in self.tensors
            if name.endswith(".blocks")
        }
        if not types:
            return {}
        if SCHEME_KEY in self.metadata:
            try:
                told = json.loads(self.metadata[SCHEME_KEY])
            except (TypeError, ValueError) as exc:
                raise CheckpointError(f"{SCHEME_KEY} is not JSON: {exc}") from exc
            if not isinstance(told, dict):
                raise CheckpointError(f"{SCHEME_KEY} is a JSON {type(told).__name__}; expected an object")
            return {**told, "quant_method": "gguf", "types": types}
        usual = Counter(types.values()).most_common(1)[0][0]
        overrides = {layer: _fields(kind) for layer, kind in types.items() if kind != usual}
        config = {"quant_method": "gguf", **_fields(usual), "types": types}
        return {**config, "overrides": overrides} if overrides else config

    def _bytes(self, stored: GgufTensor) -> Tensor:
        """A copy of a tensor's bytes; the mapping is gone when this returns."""
        try:
            mapped = np.memmap(self.folder, np.uint8, "r", stored.start, (stored.nbytes,))
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"cannot read {self.folder}: {exc}") from exc
        return torch.from_numpy(np.array(mapped))

    def _dense(self, stored: GgufTensor) -> Tensor:
        data = self._bytes(stored)
        if stored.type in _DENSE:
            return data.view(_DENSE[stored.type]).view(stored.shape)
        if stored.type in BLOCK_TYPES:
            kind = BLOCK_TYPES[stored.type]
            units = data.view(stored.shape[0], stored.shape[1] // UNIT, kind.unit_bytes)
            codes, scales, minimums = unpack_blocks(kind, units)
            width = [kind.block] * scales.shape[1]
            steps = scales.float().repeat_interleave(torch.tensor(width), dim=1)
            if minimums is None:
                layer = decode_blocks(kind, codes, scales, None, None)
                return (codes.float() - layer.zeros[0, 0]) * steps
            return codes.float() * steps + minimums.float().repeat_interleave(torch.tensor(width), dim=1)
        gguf = gguf_package()
        kinds = gguf.GGMLQuantizationType
        try:
            values = gguf.dequantize(data.view(stored.shape[0], -1).numpy(), kinds[stored.type])
        except (KeyError, NotImplementedError) as exc:
            raise CheckpointError(f"the gguf package cannot dequantize {stored.type}") from exc
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(stored.shape)


def _fields(type_name: str) -> dict[str, Any]:
    kind = BLOCK_TYPES[type_name]
    return {"bits": kind.bits, "group_size": kind.block}
